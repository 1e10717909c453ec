"""Compile for a GPU that is not there whatever a script launches; started as `python -m tests.kernels.compiling NAME`.

The interpreter takes much that the compiler refuses (a loop whose variable changes its type, say), and without a GPU
nothing else would notice. NAME is a test module of this folder with a function `launches()` that calls every kernel
once, with every variant of its compile-time arguments, on small tensors; outputs hold nothing, as nothing runs.
Prints a line for each: kernel, target, registers, bytes spilled, shared bytes.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cleanroom.kernels import runtime

TARGETS = (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.int16: "i16", torch.int8: "i8",
}  # fmt: skip
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "num_ctas"}


def signature_of(value):
    """The type of a run-time argument, as Triton writes it."""
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def resources(kernel):
    """Registers, bytes spilled to local memory, of a binary for CUDA."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", told.stdout)[1]) for name in ("REG", "STACK"))
    return f"{registers} registers, {stack} bytes of stack"


def compile_instead(seen):
    """A `runtime.launch` that compiles once for each target and set of types and constants, and launches nothing."""

    def launch(kernel, grid, *args, **meta):
        options = {name: meta.pop(name) for name in list(meta) if name in OPTIONS}
        given = dict(zip(kernel.arg_names, args, strict=False)) | meta
        fixed = set(kernel.do_not_specialize or ())
        ones = {name for name, value in given.items() if type(value) is int and value == 1 and name not in fixed}
        absent = {name for name, value in given.items() if value is None}
        constants = {p.name for p in kernel.params if p.is_constexpr} | absent | ones
        signature = {n: "constexpr" if n in constants else signature_of(given[n]) for n in kernel.arg_names}
        constexprs = {(kernel.arg_names.index(n),): given[n] for n in constants}
        key = (kernel.__name__, str(signature), str(constexprs), str(options))
        if key in seen:
            return
        # Sizes of real batches are multiples of 16, which the compiler makes much of: registers, and spills.
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in constants | fixed and isinstance(given[name], torch.Tensor | int)
        }
        # Another backend takes other paths through the compiler once a kernel, not once a variant.
        targets = TARGETS if not any(known[0] == kernel.__name__ for known in seen) else TARGETS[:1]
        seen.add(key)
        for target in targets:
            attributes = aligned if target.backend == "cuda" else None
            source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
            compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False} | options)
            about = resources(compiled) if target.backend == "cuda" else ""
            print(f"{kernel.__name__} {target.backend}-{target.arch}: {about}, {compiled.metadata.shared} shared")

    return launch


if __name__ == "__main__":
    runtime.launch = compile_instead(set())
    runtime.runs_on = lambda *tensors: True
    importlib.import_module(f"tests.kernels.{sys.argv[1]}").launches()
