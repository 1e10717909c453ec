"""One concrete input of an operation: named tensors and settings, with a content hash and a file format."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

FORMAT = 1

#: The floating dtypes a case may have, by the name used in tags, frames and command lines.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STORABLE = (*DTYPES.values(), torch.int64, torch.int32, torch.uint8, torch.bool)
_PRINTED_ELEMENTS = 48


class CaseError(ValueError):
    """A case that cannot be built, written or read: `file` is where it lies, or None; `reason` says why."""

    def __init__(self, reason: str, file: str | os.PathLike[str] | None = None):
        self.file = None if file is None else str(file)
        self.reason = reason
        super().__init__(reason if file is None else " ".join(f"{file}: {reason}".splitlines()))


@dataclass(frozen=True, repr=False, eq=False)
class Case:
    """An input of `operation`: its named tensors and its settings (JSON values).

    `origin` says where the case came from ("drawn:...", "labels:...", "workload:...", "pinned:...") and
    `tags` what is in it; neither is part of the content that `digest` identifies. Raises CaseError for tensors
    of a dtype that cannot be stored, for settings that are not JSON, and where there is no floating tensor.
    """

    operation: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    origin: str
    tags: frozenset[str]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, Tensor):
                raise CaseError(f"tensor {name!r} is a {type(tensor).__name__}, not a tensor")
            if tensor.dtype not in _STORABLE:
                raise CaseError(f"tensor {name!r} has the unsupported dtype {tensor.dtype}")
        if not any(tensor.is_floating_point() for tensor in self.tensors.values()):
            raise CaseError("a case needs at least one floating tensor")
        try:
            stored = json.loads(_canonical(self.settings))
        except (TypeError, ValueError) as error:
            raise CaseError(f"the settings are not JSON: {error}") from None
        if stored != self.settings:
            raise CaseError("the settings change when written as JSON (a tuple, or a key that is no string?)")

    @property
    def dtype(self) -> str:
        """Name of the floating dtype under test: the narrowest one among the tensors.

        Cases tagged "mixed-dtype" carry half scores beside float32 boxes; the half type is what they try.
        """
        floating = [tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()]
        return str(min(floating, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of operation, settings and tensors (dtype, shape, bytes)."""
        content = hashlib.sha256()
        header = {
            "operation": self.operation,
            "settings": self.settings,
            "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in self.tensors.items()},
        }
        content.update(_canonical(header).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu()
            # A fresh tensor: those of one element or none may have strides that cannot be viewed as bytes.
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
            content.update(flat.view(torch.uint8).numpy())
        return content.hexdigest()[:16]

    def to(self, device: str | torch.device) -> Self:
        """The same case with its tensors on `device`."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def to_bytes(self) -> bytes:
        """The case as safetensors. The same case always gives the same bytes, so that files can be compared."""
        record = {
            "format": FORMAT,
            "operation": self.operation,
            "settings": self.settings,
            "origin": self.origin,
            "tags": sorted(self.tags),
            "digest": self.digest,
        }
        # One metadata key: safetensors writes several in an order that changes from run to run.
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.tensors.items()}
        return save_tensors(tensors, metadata={"case": _canonical(record)})

    @classmethod
    def from_bytes(cls, content: bytes, file: str | os.PathLike[str] | None = None) -> Self:
        """Read a case back; raises CaseError, with `file` and the reason, for anything but an intact case."""
        try:
            tensors = load_tensors(content)
        # KeyError: a dtype that this version of safetensors knows and this PyTorch does not.
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise CaseError(f"is not a safetensors file: {error}", file) from None
        record = _record(content, file)
        try:
            case = cls(
                operation=record["operation"],
                tensors=tensors,
                settings=record["settings"],
                origin=record["origin"],
                tags=frozenset(record["tags"]),
            )
        except CaseError as error:
            raise CaseError(error.reason, file) from None
        if case.digest != record["digest"]:
            raise CaseError(f"content {case.digest} does not match its recorded digest", file)
        return case

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the case to `path`; a reader never sees a half-written file. Raises CaseError."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(self.to_bytes())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CaseError(f"cannot be written: {error.strerror}", path) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the case in the file `path`; raises CaseError as `from_bytes`."""
        try:
            if Path(path).exists() and not Path(path).is_file():
                # A pipe or a device may never end.
                raise CaseError("is not a regular file", path)
            content = Path(path).read_bytes()
        except OSError as error:
            raise CaseError(f"cannot be read: {error.strerror}", path) from None
        return cls.from_bytes(content, path)

    def __repr__(self) -> str:
        lines = [f"Case({self.operation!r}, digest={self.digest}, origin={self.origin!r}"]
        lines.append(f"  tags: {', '.join(sorted(self.tags))}")
        lines.append(f"  settings: {_canonical(self.settings)}")
        for name, tensor in self.tensors.items():
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            values = f" {tensor.tolist()}" if tensor.numel() <= _PRINTED_ELEMENTS else ""
            lines.append(f"  {name}: {str(tensor.dtype).removeprefix('torch.')} {shape}{values}")
        return "\n".join(lines) + ")"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _record(content: bytes, file: str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """The case's own record in a safetensors header that the library has already accepted."""
    # The library's `load` reads tensors only; the header is length-prefixed JSON.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = header.get("__metadata__", {}).get("case")
    if text is None:
        raise CaseError("is a safetensors file but not a case (no case record in its metadata)", file)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaseError(f"the case record is not JSON: {error}", file) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CaseError(f"the case record is not of format {FORMAT}", file)
    for key, kind in {"operation": str, "settings": dict, "origin": str, "tags": list, "digest": str}.items():
        if not isinstance(record.get(key), kind):
            raise CaseError(f"the case record has no {kind.__name__} {key!r}", file)
    if not all(isinstance(tag, str) for tag in record["tags"]):
        raise CaseError("the case record has a tag that is no string", file)
    return record
