"""`harness doctor`: versions, devices and oracles present."""

from __future__ import annotations

import os
import platform

from harness import oracles
from reference import OracleError


def doctor() -> str:
    """A line a fact; what is missing says how to bring it."""
    import torch

    from cleanroom.kernels.runtime import describe
    from harness.run import package_versions

    lines = [f"python {platform.python_version()}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}"]
    lines += [f"{name} {version}" for name, version in package_versions().items()]
    if torch.cuda.is_available():
        lines += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("no CUDA device: candidates run on the CPU")
    lines.append(f"kernels: {describe()}")
    for pin in oracles.pins():
        try:
            oracles.locate(pin)
            lines.append(f"oracle {pin}: present")
        except OracleError as error:
            lines.append(f"oracle {error}")
    return "\n".join(lines) + "\n"
