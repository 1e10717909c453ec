"""`harness list` and `harness show`: what there is, and how a candidate is called."""

from __future__ import annotations

import tomllib

from cases import field
from cases.workloads import WORKLOADS
from harness import oracles
from harness.operation import Operation
from harness.operations import NAMES, operation
from harness.plan import PROFILES


def listing() -> str:
    """Operations with their oracles, workloads and profiles, a line each."""
    lines, width = ["operations"], max(map(len, NAMES))
    for name in NAMES:
        declared = operation(name)
        own = [pin for pin in oracles.pins() if oracles.package(pin) in declared.upstreams]
        lines += [f"  {name:<{width}} {declared.summary}", f"  {'':<{width}} oracles: {', '.join(own)}"]
        lines += [f"  {'':<{width}} candidates: {', '.join(declared.candidates)}"]
        if declared.gradients:
            lines += [f"  {'':<{width}} gradients: {', '.join(declared.gradients)}"]
    lines += ["workloads", *(f"  {name:<10} {workload.summary}" for name, workload in WORKLOADS.items())]
    lines += ["profiles"]
    for name, profile in tomllib.loads(PROFILES.read_text()).items():
        kind = "randomized" if profile["randomized"] else "the same cases every time"
        lines.append(f"  {name:<10} {profile['examples']} cases an operation and oracle, {kind}")
    return "\n".join(lines) + "\n"


def show(declared: Operation) -> str:
    """Everything a kernel author needs to plug in a candidate."""
    lines = [declared.summary, f"source: {declared.source}", "", "inputs"]
    lines += [f"  {i.name:<17} {i.shape:<12} {i.dtype:<9} {i.meaning}" for i in declared.inputs]
    lines += ["", "settings"]
    lines += [f"  {s.name:<17} {s.default!r:<12} {s.meaning}" for s in declared.settings]
    lines += ["", "outputs (decisions are judged by their margin, numbers by their error budget)"]
    for o in declared.outputs:
        kind = "decision" if o.decision else "number"
        lines.append(f"  {o.name:<15} {o.shape:<10} {o.dtype:<15} {kind:<9} {o.meaning}")
    if declared.gradients:
        lines += ["", f"gradients, compared as outputs are: {', '.join(declared.gradients)}"]
    lines += ["", "oracles and the keyword settings that make a candidate behave like a version"]
    for pin in oracles.pins():
        if oracles.package(pin) in declared.upstreams:
            era = declared.upstreams[oracles.package(pin)].era(pin.partition("==")[2])
            lines.append(f"  {pin:<22} {era or 'none'}")
    reported = field.rows_of(declared.name)
    if reported:
        lines += ["", "faults from the field that its pinned cases hold against a candidate"]
        lines += [f"  {', '.join((row.id, *row.also))}: {row.fact}" for row in reported]
    leak = "alias nothing" if declared.gradients else "carry no gradient, alias nothing"
    arguments = ", ".join([*(i.name for i in declared.inputs), "**settings"])
    lines += [
        "",
        "calling convention of a candidate",
        f"  def candidate({arguments}) -> Mapping or NamedTuple with the outputs above",
        "  **settings are those above and the keywords of the oracle's version.",
        f"  Everything is passed by keyword. Inputs stay unchanged; outputs {leak}.",
        f"  python -m harness run --ops {declared.name} --candidate mine=my_module:candidate",
    ]
    return "\n".join(lines) + "\n"
