"""What every test stands on: interpreted kernels where there is no GPU, and draws that depend on nothing else."""

import os

# Several processes of tests share the cores: a thread that waits for another one must not spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import Phase, settings

# Decided before anything imports a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import harness.drawing  # noqa: F401 - literals of the modules imported by then do not season the draws

# No shrinking: an interpreted kernel may take seconds, and the failing case is printed as it was drawn.
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("suite")
