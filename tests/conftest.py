"""Kernels run under Triton's interpreter where there is no CUDA device; decided before anything imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
