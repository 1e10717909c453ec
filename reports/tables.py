"""The tables of a report: rows of a run turned into cells that know their text and the value behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reports import text
from reports.frames import GROUP

if TYPE_CHECKING:
    import pandas as pd

    from reports.frames import Run

GOOD, BAD, WARN, QUIET = "good", "bad", "warn", "quiet"
TONES = {
    **{"faster": GOOD, "slower": BAD, "same": QUIET, "ambiguous": WARN, "too-few-pairs": WARN, "disturbed": WARN},
    **{"match": GOOD, "tie": GOOD, "both-reject": GOOD, "known-divergence": WARN},
}
"""How a verdict looks; every verdict that is not listed is bad. The word itself is always printed too."""


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the number it stands for (sorting and tests read it), and how it looks.

    `tone` repeats in colour what the text says; `part` in [0, 1] draws a bar of that length under a number.
    """

    text: str
    value: float | None = None
    tone: str = ""
    part: float | None = None


@dataclass(frozen=True)
class Column:
    """One column; `kind` is "text", "number", "status", "prose" or "era", `hint` explains the heading."""

    key: str
    label: str
    kind: str = "text"
    hint: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under one heading; the title is "" where a table has no groups."""

    title: str
    rows: tuple[Mapping[str, Cell], ...]


@dataclass(frozen=True)
class Table:
    """A captioned table of groups of rows."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]

    @property
    def rows(self) -> list[Mapping[str, Cell]]:
        """All rows, in order, without the headings."""
        return [row for group in self.groups for row in group.rows]


def tone(verdict: str) -> str:
    """How a verdict looks."""
    return TONES.get(verdict, BAD)


def operations(run: Run) -> list[dict[str, Any]]:
    """Counts of verdicts a group: those of summary.json, or of the frame while there is no summary."""
    if run.summary is not None:
        return run.summary["operations"]
    if run.verdicts is None:
        return []
    return [_tally(key, rows) for key, rows in run.verdicts.groupby(list(GROUP), sort=False)]


def _tally(key: tuple[str, ...], rows: pd.DataFrame) -> dict[str, Any]:
    named = {verdict: int((rows["verdict"] == verdict).sum()) for verdict in ("match", "tie", "mismatch")}
    return {
        **dict(zip(GROUP, key, strict=True)),
        "cases": len(rows),
        **named,
        "other": len(rows) - sum(named.values()),
        "tie_share": named["tie"] / len(rows),
    }


VALUE, GRADIENT = "value", "gradient"
ERRORS = {VALUE: "error", GRADIENT: "gradient_error"}
"""Column of the verdicts that holds the worst error of each quantity, as a share of its budget."""


def worst_errors(run: Run, quantity: str = VALUE) -> dict[tuple[str, ...], float]:
    """The worst error a group as a share of its budget; groups that never had one are left out."""
    if run.verdicts is None:
        return {}
    return run.verdicts.groupby(list(GROUP))[ERRORS[quantity]].max().dropna().to_dict()


def _gradients(run: Run) -> dict[tuple[str, ...], dict[str, Any]]:
    """Cases whose gradients were compared and how many of them differed, a group; without gradients, none."""
    if run.verdicts is None or run.verdicts.empty:
        return {}
    fell = (run.verdicts["verdict"] == "mismatch") & run.verdicts["output"].str.startswith("gradient of ")
    compared = run.verdicts[run.verdicts["gradient_error"].notna()].assign(fell=fell)
    return {
        key: {"cases": len(rows), "match": len(rows) - int(rows["fell"].sum()), "mismatch": int(rows["fell"].sum())}
        for key, rows in compared.groupby(list(GROUP))
    }


def parity(run: Run) -> Table:
    """Counts of verdicts, share of ties against its cap and worst error: a row a group, and one for its gradients."""
    worst, gradients, worst_gradient = worst_errors(run), _gradients(run), worst_errors(run, GRADIENT)
    rows = []
    for row in operations(run):
        key = tuple(row[name] for name in GROUP)
        rows.append(_parity_row(row, worst.get(key)))
        if key in gradients:
            rows.append(_gradient_row(row, gradients[key], worst_gradient[key]))
    columns = (
        Column("operation", "Operation"),
        Column("oracle", "Oracle", hint="upstream's code at one version"),
        Column("candidate", "Candidate", hint="the implementation under test"),
        Column("device", "Device"),
        Column("quantity", "Of", hint="outputs and decisions, or the gradients of the inputs that carry one"),
        Column("cases", "Cases", "number"),
        Column("match", "Match", "number"),
        Column("tie", "Tie", "number"),
        Column("mismatch", "Mismatch", "number"),
        Column("other", "Other", "number", "both reject, known divergences, errors, crashes, time limits"),
        Column("tie_share", "Tie share", "number", "ties among all cases, and the most that is allowed"),
        Column(
            "worst",
            "Worst error",
            "number",
            "largest error as a share of its budget; above 100% is a mismatch",
        ),
    )
    return Table("parity", "Parity of every candidate with every oracle", columns, (Group("", tuple(rows)),))


def _parity_row(row: Mapping[str, Any], worst: float | None) -> dict[str, Cell]:
    share, cap = row["tie_share"], row.get("tie_cap")
    capped = not (text.absent(share) or text.absent(cap))
    tied = _number(text.share, share, BAD if capped and share > cap else "", _part(share, cap))
    return {
        **{key: Cell(row[key]) for key in GROUP},
        "quantity": Cell(VALUE),
        **{key: _number(text.count, row[key]) for key in ("cases", "match", "tie", "other")},
        "mismatch": _number(text.count, row["mismatch"], BAD if row["mismatch"] else ""),
        "tie_share": replace(tied, text=f"{tied.text} of {text.share(cap)}") if capped else tied,
        "worst": _worst(worst),
    }


def _gradient_row(row: Mapping[str, Any], counts: Mapping[str, int], worst: float) -> dict[str, Cell]:
    """Ties and other verdicts are a case's, not a gradient's: they stand in the row above."""
    return {
        **{key: Cell(row[key]) for key in GROUP},
        "quantity": Cell(GRADIENT),
        **{key: _number(text.count, counts[key]) for key in ("cases", "match")},
        **{key: _number(text.count, None) for key in ("tie", "other", "tie_share")},
        "mismatch": _number(text.count, counts["mismatch"], BAD if counts["mismatch"] else ""),
        "worst": _worst(worst),
    }


def _worst(share: float | None) -> Cell:
    return _number(text.share, share, BAD if share is not None and share > 1 else "", _part(share, 1.0))


def _number(say: Callable[[float | None], str], value: float | None, look: str = "", part: float | None = None) -> Cell:
    """A cell for a number that may be absent."""
    return Cell(say(value), None if text.absent(value) else value, look, part)


def _part(value: float | None, whole: float | None) -> float | None:
    return None if text.absent(value) or not whole else min(1.0, max(0.0, value / whole))


def measured(run: Run) -> pd.DataFrame | None:
    """The measurements, or None where nothing was measured."""
    return None if run.measurements is None or run.measurements.empty else run.measurements


def workload(row: Mapping[str, Any], directions: int) -> str:
    """A workload's label: its name, and the direction where a run has more than one."""
    return row["workload"] if directions == 1 else f"{row['workload']} {row['direction']}"


def title(operation: str, oracle: str, candidate: str, device: str) -> str:
    """A group's heading."""
    return f"{operation}: {candidate} against {oracle} on {device}"


def speed(run: Run) -> Table:
    """Medians of both, their ratio with its interval, and one sentence a row."""
    columns = (
        Column("workload", "Workload"),
        Column("direction", "Direction"),
        Column("pairs", "Pairs", "number", "interleaved calls of upstream and candidate, in random order"),
        Column("oracle_ns", "Upstream", "number", "median time of one call"),
        Column("candidate_ns", "Candidate", "number", "median time of one call"),
        Column("speedup", "Speedup", "number", "upstream's time over the candidate's"),
        Column("interval", "99% interval", "number", "percentile bootstrap of the paired log-ratios"),
        Column("verdict", "Verdict", "status"),
        Column("sentence", "In words", "prose"),
    )
    return Table("speed", "Time of one call", columns, tuple(_groups(run, _speed_row)))


def _speed_row(row: Mapping[str, Any]) -> dict[str, Cell]:
    return {
        "workload": Cell(row["workload"]),
        "direction": Cell(row["direction"]),
        "pairs": _number(text.count, row["pairs"]),
        "oracle_ns": _number(text.duration, row["oracle_ns"]),
        "candidate_ns": _number(text.duration, row["candidate_ns"]),
        "speedup": _number(text.ratio, row["speedup"]),
        "interval": _number(lambda _: interval(row), row["speedup_low"]),
        "verdict": Cell(row["verdict"], tone=tone(row["verdict"])),
        "sentence": Cell(sentence(row)),
    }


def interval(row: Mapping[str, Any]) -> str:
    """The interval of a speedup, or nothing where there were too few pairs for one."""
    low, high = row["speedup_low"], row["speedup_high"]
    if text.absent(low) or text.absent(high):
        return text.NOTHING
    return f"{text.significant(low)} to {text.significant(high)}"


def sentence(row: Mapping[str, Any]) -> str:
    """One plain sentence on a measurement: what was found, and how sure it is."""
    said = "Not measured." if text.absent(row["speedup"]) else _found(row)
    return f"{said} {row['note'].rstrip('.')}." if row["note"] else said


def _found(row: Mapping[str, Any]) -> str:
    pairs, say = text.count(row["pairs"]), text.significant
    speedup, low, high = row["speedup"], row["speedup_low"], row["speedup_high"]
    if row["verdict"] == "too-few-pairs" or text.absent(low) or text.absent(high):
        return f"Only {pairs} pairs: an estimate, not a finding."
    return {
        "disturbed": "The machine was busy with something else: an estimate, not a finding.",
        "faster": f"At least {say(low)} times as fast as upstream, most likely {say(speedup)}.",
        "slower": f"Slower: takes at least {say(1 / high)} times as long, most likely {say(1 / speedup)}.",
        "same": "No difference beyond the dead band.",
    }.get(row["verdict"], f"Undecided: {pairs} pairs allow anything from {interval(row)}.")


def memory(run: Run) -> Table:
    """Peak bytes of one call above its inputs, for both, against the bytes of the outputs."""
    columns = (
        Column("workload", "Workload"),
        Column("direction", "Direction"),
        Column("peak_bytes_oracle", "Upstream peak", "number", "most bytes held above the inputs in one call"),
        Column("peak_bytes_candidate", "Candidate peak", "number", "most bytes held above the inputs in one call"),
        Column("ratio", "Saving", "number", "upstream's peak over the candidate's"),
        Column("output_bytes", "Outputs", "number", "bytes of the results themselves, part of both peaks"),
        Column("beyond", "Saving beyond outputs", "number", "the same, with the outputs taken off both peaks"),
    )
    return Table("memory", "Peak memory of one call", columns, tuple(_groups(run, _memory_row)))


def _memory_row(row: Mapping[str, Any]) -> dict[str, Cell]:
    theirs, ours, output = row["peak_bytes_oracle"], row["peak_bytes_candidate"], row["output_bytes"]
    saving, beyond = quotient(theirs, ours), _beyond(theirs, ours, output)
    return {
        "workload": Cell(row["workload"]),
        "direction": Cell(row["direction"]),
        "peak_bytes_oracle": _number(text.size, theirs),
        "peak_bytes_candidate": _number(text.size, ours),
        "ratio": _number(text.ratio, saving, BAD if saving is not None and saving < 1 else ""),
        "output_bytes": _number(text.size, output),
        "beyond": _number(text.ratio, beyond),
    }


def quotient(above: float | None, below: float | None) -> float | None:
    """`above / below`, or None where either is missing or the divisor is not positive."""
    return None if text.absent(above) or text.absent(below) or below <= 0 else above / below


def _beyond(theirs: float | None, ours: float | None, output: float | None) -> float | None:
    if text.absent(theirs) or text.absent(ours) or text.absent(output):
        return None
    return quotient(theirs - output, ours - output)


def movement(run: Run) -> Table:
    """How far each call is from only moving the bytes that it must move."""
    columns = (
        Column("workload", "Workload"),
        Column("direction", "Direction"),
        Column("minimum_bytes", "Must move", "number", "inputs read once and outputs written once"),
        Column("oracle_rate", "Upstream", "number", "those bytes over the median time"),
        Column("candidate_rate", "Candidate", "number", "those bytes over the median time"),
        Column("held", "Held", "number", "the candidate's peak over the bytes that must move"),
    )
    return Table("movement", "Distance to the bytes that must move", columns, tuple(_groups(run, _movement_row)))


def _movement_row(row: Mapping[str, Any]) -> dict[str, Cell]:
    least, theirs, ours = row["minimum_bytes"], row["oracle_ns"], row["candidate_ns"]
    held = quotient(row["peak_bytes_candidate"], least)
    return {
        "workload": Cell(row["workload"]),
        "direction": Cell(row["direction"]),
        "minimum_bytes": _number(text.size, least),
        "oracle_rate": Cell(text.rate(least, theirs), quotient(least, theirs)),
        "candidate_rate": Cell(text.rate(least, ours), quotient(least, ours)),
        "held": _number(text.ratio, held),
    }


def launches(run: Run) -> Table:
    """What a GPU was asked to do: kernels, waits of the host, graph replay, and its distance to a copy."""
    columns = (
        Column("workload", "Workload"),
        Column("direction", "Direction"),
        Column("launches_oracle", "Launches of upstream", "number"),
        Column("launches_candidate", "Launches", "number"),
        Column("waits_oracle", "Waits of upstream", "number", "times the host waited for the device in one call"),
        Column("waits_candidate", "Waits", "number"),
        Column("graph_ns", "Graph replay", "number", "median time of the call captured as a CUDA graph"),
        Column("limit", "Times the limit", "number", "replay over the time a copy of the bytes that must move takes"),
        Column("graph_note", "Note", "prose"),
    )
    frame = measured(run)
    if frame is None or "launches_candidate" not in frame or frame["launches_candidate"].isna().all():
        return Table("launches", "On the GPU", columns, ())
    return Table("launches", "On the GPU", columns, tuple(_groups(run, _launches_row)))


def _launches_row(row: Mapping[str, Any]) -> dict[str, Cell]:
    replay, rate = row["graph_ns"], row["copy_rate"]
    least = quotient(row["minimum_bytes"], rate)  # seconds
    counts = ("launches_oracle", "launches_candidate", "waits_oracle", "waits_candidate")
    return {
        "workload": Cell(row["workload"]),
        "direction": Cell(row["direction"]),
        **{name: _number(text.count, row[name]) for name in counts},
        "graph_ns": _number(text.duration, replay),
        "limit": _number(text.ratio, None if least is None else quotient(replay, least * 1e9)),
        "graph_note": Cell("" if text.absent(row["graph_note"]) else row["graph_note"]),
    }


def _groups(run: Run, cells: Callable[[Mapping[str, Any]], dict[str, Cell]]) -> Iterator[Group]:
    frame = measured(run)
    if frame is None:
        return
    for key, rows in frame.groupby(list(GROUP), sort=False):
        yield Group(title(*key), tuple(cells(row) for row in rows.to_dict("records")))


def divergences(run: Run) -> Table:
    """Known divergences that were met, counted by id."""
    columns = (
        Column("divergence", "Divergence"),
        Column("operation", "Operation"),
        Column("cases", "Cases", "number"),
        Column("reason", "Reason", "prose"),
    )
    rows: list[dict[str, Cell]] = []
    if run.verdicts is not None:
        met = run.verdicts[run.verdicts["divergence"] != ""]
        for (name, operation), cases in met.groupby(["divergence", "operation"], sort=True):
            rows.append(
                {
                    "divergence": Cell(name),
                    "operation": Cell(operation),
                    "cases": _number(text.count, len(cases)),
                    "reason": Cell(cases["detail"].iloc[0]),
                }
            )
    return Table("divergences", "Known divergences met", columns, (Group("", tuple(rows)),))


def gate(run: Run) -> Table:
    """The bars of the gate, those that fell first: limit, value, whether it held."""
    columns = (
        Column("bar", "Bar"),
        Column("limit", "Limit", "number"),
        Column("value", "Value", "number"),
        Column("state", "State", "status"),
        Column("reason", "Reason", "prose"),
    )
    bars = [] if run.summary is None else sorted(run.summary["gate"], key=lambda bar: bool(bar["ok"]))
    rows = tuple(
        {
            "bar": Cell(text.anything(bar["bar"])),
            "limit": _number(text.anything, bar["limit"]),
            "value": _number(text.anything, bar["value"]),
            "state": Cell("held", tone=GOOD) if bar["ok"] else Cell("fell", tone=BAD),
            "reason": Cell(text.anything(bar["reason"])),
        }
        for bar in bars
    )
    return Table("gate", "Bars of the gate", columns, (Group("", rows),))
