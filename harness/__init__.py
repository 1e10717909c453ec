"""Runs cases on oracles and candidates, judges, measures and gates. Started with `python -m harness run`."""

import os

# Before PyTorch is imported anywhere: its profiler writes lines to stderr for every profile unless told otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
