"""Adapters of torch-linear-assignment: a baseline of the assignment, SciPy on the CPU and Triton on CUDA."""
