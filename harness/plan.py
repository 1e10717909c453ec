"""What a run will do: the request of the command line checked and spelled out, before anything starts."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reference
from harness import baseline, oracles
from harness.candidates import BUILT_IN, default_candidates, interprets, prepare_interpreter
from harness.operations import NAMES, UnknownOperation, operation
from harness.worker import WorkerSettings, plug_in

PROFILES = Path(__file__).with_name("profiles.toml")
DTYPES = ("float32", "float64", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "auto")


class RequestError(ValueError):
    """The request is wrong: exit code 4."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a run tries; `run.json` holds it, so a resumed run is the same run."""

    operations: tuple[str, ...]
    oracles: tuple[str, ...]
    candidates: dict[str, str]
    device: str
    dtypes: tuple[str, ...]
    profile: str
    examples: int
    seed: int
    workloads: tuple[str, ...] | None
    labels: str | None
    parity: bool
    bench: bool
    workers: int
    time_limit: float
    memory_limit: float | None
    row_seconds: float
    shrink_seconds: float

    baseline: str = baseline.STORED
    """The file of the baseline that timings are held against, "stored" for the project's own, or "none"."""

    relations: tuple[str, ...] = ()
    """Relations without an oracle that are tried."""
    relation_cases: int = 0
    """Cases on which each is tried, an operation and subject."""

    def as_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan of a stored run; RequestError where its fields are not a plan's."""
        try:
            value = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
            return cls(**value)
        except TypeError as error:
            raise RequestError(f"run.json: settings: {error}") from error

    def pairs(self) -> list[tuple[str, str]]:
        """(operation, oracle) pairs in which the oracle has the operation."""
        return [
            (name, oracle)
            for name in self.operations
            for oracle in self.oracles
            if oracles.has(oracle, operation(name)) and self.candidates_of(name)
        ]

    def worker(self, oracle: str, threads: int) -> WorkerSettings:
        """How a worker for one oracle is started."""
        return WorkerSettings(oracle, self.candidates, threads, self.device, self.memory_limit)

    def candidates_of(self, name: str) -> tuple[str, ...]:
        """The candidates that an operation has: all that are plugged in, and the built-in ones it declares."""
        declared = operation(name).candidates
        return tuple(candidate for candidate, target in self.candidates.items() if target or candidate in declared)


def profile(name: str) -> dict[str, Any]:
    """A named profile of `profiles.toml`."""
    table = tomllib.loads(PROFILES.read_text())
    if name not in table:
        raise RequestError(f"--profile {name!r}: there are {', '.join(table)}")
    return table[name]


def names(text: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """A comma-separated list checked against what there is; all of it when not given."""
    if text is None:
        return known
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [part for part in chosen if part not in known]
    if unknown:
        raise RequestError(f"{option} {', '.join(unknown)}: there are {', '.join(known)}")
    if not chosen:
        raise RequestError(f"{option}: empty")
    return chosen


def parse_operations(text: str | None) -> tuple[str, ...]:
    """The operations asked for, all by default."""
    chosen = names(text, NAMES, "--ops")
    for name in chosen:
        try:
            operation(name)
        except UnknownOperation as error:
            raise RequestError(str(error)) from error
    return chosen


def parse_oracles(listed: str | None, added: list[str]) -> tuple[str, ...]:
    """Pins by name (`--oracles`), and checkouts or installed versions (`--oracle NAME=WHERE`).

    A package named by `--oracle` replaces its default pins, unless `--oracles` asks for them too.
    """
    specs = [reference.OracleSpec.parse(text) for text in added]
    if listed is not None:
        texts = [part.strip() for part in listed.split(",") if part.strip()]
        specs = [reference.OracleSpec.parse(text) for text in texts] + specs
    else:
        replaced = {spec.name for spec in specs}
        specs = [spec for spec in map(reference.OracleSpec.parse, oracles.pins()) if spec.name not in replaced] + specs
    if not specs:
        raise RequestError("--oracles: empty")
    return tuple(dict.fromkeys(str(spec) for spec in specs))


def parse_candidates(backends: str | None, plugged: list[str], device: str) -> dict[str, str]:
    """Candidates by name: built-in backends, and `NAME=MODULE:ATTRIBUTE` of the user."""
    chosen = names(backends, BUILT_IN, "--backends") if backends is not None else default_candidates(device)
    if backends is None and plugged:
        chosen = ()
    found = dict.fromkeys(chosen, "")
    for text in plugged:
        name, separator, target = text.partition("=")
        if not separator or not name:
            raise RequestError(f"--candidate {text!r}: expected NAME=MODULE:ATTRIBUTE")
        if name in found:
            raise RequestError(f"--candidate {text!r}: the name {name!r} is taken")
        found[name] = target
    return found


def check_candidates(candidates: dict[str, str], device: str) -> None:
    """Import every plugged-in candidate here once, so that a typing mistake is said at once; so is absent Triton."""
    if interprets(candidates, device) and (reason := prepare_interpreter()):
        raise RequestError(f"--backends triton: {reason}")
    for target in candidates.values():
        if target:
            try:
                plug_in(target)
            except ValueError as error:
                raise RequestError(str(error)) from error


def resolve_device(name: str) -> str:
    """ "cpu" or "cuda"; `auto` takes CUDA where PyTorch sees it."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: PyTorch sees no CUDA device here")
    return name


def check_pairs(plan: Plan) -> None:
    """Every operation asked for has an oracle asked for, and every oracle is present."""
    tried = {name for name, _ in plan.pairs()}
    for name in plan.operations:
        if not plan.candidates_of(name):
            raise RequestError(f"operation {name} has no candidate {', '.join(plan.candidates)}")
        if name not in tried:
            known = ", ".join(operation(name).upstreams)
            raise RequestError(f"operation {name} has no oracle among {', '.join(plan.oracles)}; it has {known}")
    for oracle in dict.fromkeys(own for _, own in plan.pairs()):
        oracles.locate(oracle)
