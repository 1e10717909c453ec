"""Fused Triton kernels of the assigners and losses, one file a subject; `runtime` says whether they can run here."""
