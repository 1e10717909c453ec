"""The verdict at the top of every form of the report: one word, one sentence, a few facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reports import text
from reports.tables import BAD, GOOD, WARN, measured, operations

if TYPE_CHECKING:
    from reports.frames import Run

STATES = {
    0: ("Passed", GOOD),
    1: ("Failed", BAD),
    2: ("Interrupted", WARN),
    3: ("Incomplete", BAD),
    4: ("Refused", BAD),
    5: ("Nothing tried", BAD),
}
"""Word and tone of every exit code of the design."""


SHOWN = 3
"""Fallen bars that the headline names; the table of the gate has all of them."""


@dataclass(frozen=True)
class Fact:
    """One number of the headline with what it counts; `value` is the raw number behind the text."""

    name: str
    text: str
    value: float | None
    tone: str = ""
    note: str = ""


def state(run: Run) -> tuple[str, str]:
    """The verdict in a word, and its tone."""
    if run.summary is None:
        return "Unfinished", WARN
    return STATES.get(run.summary["exit_code"], (f"Exit code {run.summary['exit_code']}", BAD))


def sentence(run: Run) -> str:
    """The verdict of summary.json (what stands so far without one), the share of ties, the span of speeds."""
    rows = operations(run)
    said = []
    if any(row["cases"] for row in rows):
        said.append(f"{text.share(_tie_share(rows))} of the cases are ties")
    ends = extremes(run)
    if ends:
        slowest, fastest = (text.ratio(row["speedup"]) for row in ends)
        span = slowest if slowest == fastest else f"{slowest} to {fastest}"
        said.append(f"the candidates run at {span} upstream's speed")
    verdict = run.summary["sentence"] if run.summary is not None else _so_far(run, rows)
    measures = "; ".join(said)
    return f"{verdict} {measures[0].upper()}{measures[1:]}." if said else verdict


def _so_far(run: Run, rows: list[dict[str, Any]]) -> str:
    cases = sum(row["cases"] for row in rows)
    failing = 0 if run.failing is None else len(run.failing)
    tried = f"{_counted(cases, 'case')} over {_counted(len({row['oracle'] for row in rows}), 'oracle')}"
    return f"The run is not finished: so far {tried}, {failing or 'none'} failing."


def _counted(number: int, what: str) -> str:
    return f"{text.count(number)} {what}{'' if number == 1 else 's'}"


def notes(run: Run) -> Iterator[str]:
    """A sentence on the bars that fell, and one on everything that the run folder lacks."""
    fell = [] if run.summary is None else [text.anything(bar["bar"]) for bar in run.summary["gate"] if not bar["ok"]]
    if fell:
        more = f" and {len(fell) - SHOWN} more" if len(fell) > SHOWN else ""
        yield f"{_counted(len(fell), 'bar')} fell: {'; '.join(fell[:SHOWN])}{more}."
    if run.summary is None:
        yield "There is no summary.json, so there is no verdict yet."
    if run.summary is not None and run.summary.get("baseline"):
        yield text.anything(run.summary["baseline"])
    if not run.whole:
        return
    if run.verdicts is None or run.verdicts.empty:
        yield f"Parity was not checked{_lacks(run.verdicts, 'verdicts.parquet')}."
    if measured(run) is None:
        yield f"Time and memory were not measured{_lacks(run.measurements, 'measurements.parquet')}."
    elif run.samples is None:
        yield "The raw samples behind the medians are missing (no samples.parquet)."


def _lacks(frame: object, name: str) -> str:
    return f" (no {name})" if frame is None else ""


def _tie_share(rows: list[dict[str, Any]]) -> float:
    return sum(row["tie"] for row in rows) / sum(row["cases"] for row in rows)


def extremes(run: Run) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The measurements with the lowest and the highest speedup, or None where nothing has one."""
    frame = measured(run)
    if frame is None or frame["speedup"].isna().all():
        return None
    return frame.loc[frame["speedup"].idxmin()].to_dict(), frame.loc[frame["speedup"].idxmax()].to_dict()


def facts(run: Run) -> Iterator[Fact]:
    """The few numbers that a reader looks for first."""
    rows = operations(run)
    cases = sum(row["cases"] for row in rows)
    if run.whole:
        oracles = _counted(len({row["oracle"] for row in rows}), "oracle")
        yield Fact("Cases", text.count(cases), cases, note=f"over {oracles}")
    failing = run.failing
    if failing is not None and run.whole:
        yield Fact("Failing cases", text.count(len(failing)), len(failing), BAD if len(failing) else GOOD)
    if cases:
        share = _tie_share(rows)
        yield Fact("Ties", text.share(share), share, note="of all cases")
    ends = extremes(run)
    if ends:
        for name, row in zip(("Slowest", "Fastest"), ends, strict=True):
            note = f"{row['operation']}, {row['workload']}"
            yield Fact(name, text.ratio(row["speedup"]), row["speedup"], note=note)
    if run.summary is not None and run.summary["gate"]:
        bars = run.summary["gate"]
        held = sum(bool(bar["ok"]) for bar in bars)
        yield Fact("Bars held", f"{held} of {len(bars)}", held, GOOD if held == len(bars) else BAD)
