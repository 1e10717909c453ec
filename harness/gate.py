"""The gate: reads the frames of a run folder, holds them against the bars, and says the exit code."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from harness import baseline
from harness.bars import mutation, relations, versions
from harness.bars.bar import Bar, thresholds, tied_cases
from harness.candidates import BUILT_IN
from harness.plan import Plan
from harness.runfolder import RunFolder
from harness.statistics import DECIDABLE
from harness.verdict import HOLDS

if TYPE_CHECKING:
    import pandas as pd

HOLDS_ALL, FELL, INTERRUPTED, INCOMPLETE, WRONG_REQUEST, NOTHING_TRIED = range(6)
"""Exit codes of every command (`design.md`)."""

FEWEST_FOR_A_SHARE = 30
"""Cases of a dtype under which a share of ties says nothing, so its cap is not held against the run."""

GROUP = ["operation", "oracle", "candidate", "device"]
MEASURED = ["speedup", "speedup_low", "speedup_high", "peak_bytes_oracle", "peak_bytes_candidate"]


MORE = {"relations": relations, "mutants": mutation, "versions": versions}
"""Frames that not every run has, and the module that holds bars against each."""


def summarise(
    folder: RunFolder, plan: Plan | None, *, interrupted: bool = False, lost: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The summary of a run folder: counts, bars, passed, failed and the exit code.

    `plan` is None where no cases were to be drawn: in a folder of `harness mutate` or `harness matrix` alone.
    `lost` names what could not be tried at all (a worker that never started): exit code 3, never 0.
    """
    verdicts, measurements = folder.frame("verdicts"), folder.frame("measurements")
    more = {name: frame for name in MORE if len(frame := folder.frame(name))}
    operations = _operations(verdicts)
    bars = [*_tie_bars(verdicts), *_tried_bars(verdicts, plan), *_measured_bars(measurements)]
    stored = baseline.chosen(plan.baseline) if plan and len(measurements) else {}
    device_name = folder.read_json("run.json").get("device_name", "")
    bars += baseline.bars(measurements, stored, device_name)
    bars += [bar for name, frame in more.items() for bar in MORE[name].bars(frame)]
    if plan and plan.parity and plan.relations and not interrupted:
        bars += relations.untried(folder.frame("relations"), plan)
    held = int(verdicts["verdict"].isin(HOLDS).sum()) if len(verdicts) else 0
    failed = len(verdicts) - held + sum(not bar.ok for bar in bars)
    passed = held + sum(bar.ok for bar in bars)
    if interrupted:
        code = INTERRUPTED
    elif lost:
        code = INCOMPLETE
    elif not len(verdicts) and not len(measurements) and not more:
        code = NOTHING_TRIED
    else:
        code = FELL if failed else HOLDS_ALL
    # A folder of `mutate` or `matrix` alone is spoken for by their own sentences, unless it did not come that far.
    silent = more and plan is None and code in {HOLDS_ALL, FELL}
    own = [] if silent else [_sentence(operations, failed, code, lost, plan)]
    return {
        "passed": passed,
        "failed": failed,
        "exit_code": code,
        "baseline": baseline.said(measurements, stored, device_name) if plan and plan.baseline != baseline.NONE else "",
        "sentence": " ".join([*own, *(MORE[name].sentence(frame) for name, frame in more.items())]),
        "lost": list(lost),
        "gate": [vars(bar) for bar in bars],
        "failures": _failures(verdicts),
        "operations": operations,
        "measurements": _measurements(measurements),
    }


def _operations(verdicts: pd.DataFrame) -> list[dict[str, Any]]:
    if not len(verdicts):
        return []
    found = []
    for key, rows in verdicts.groupby(GROUP, sort=True):
        count = rows["verdict"].value_counts()
        match, tie, mismatch = (int(count.get(name, 0)) for name in ("match", "tie", "mismatch"))
        found.append(
            {
                **dict(zip(GROUP, key, strict=True)),
                "cases": len(rows),
                "match": match,
                "tie": tie,
                "mismatch": mismatch,
                "other": len(rows) - match - tie - mismatch,
                "tie_share": tie / len(rows),
            }
        )
    return found


def _failures(verdicts: pd.DataFrame) -> list[dict[str, Any]]:
    """One line a kind of failure: how often, and the first (shrunk where shrinking got anywhere) with its file."""
    if not len(verdicts):
        return []
    fell = verdicts[~verdicts["verdict"].isin(HOLDS)].sort_values("index", kind="stable")
    if "shrunk" in fell:
        fell = fell.sort_values("shrunk", kind="stable", na_position="last")
    kind = [*GROUP, "verdict", "output"]
    first = fell.drop_duplicates(kind)[[*kind, "detail", "replay"]].to_dict("records")
    counts = fell.groupby(kind).size()
    return [{**row, "cases": int(counts[tuple(row[name] for name in kind)])} for row in first]


def _tie_bars(verdicts: pd.DataFrame) -> list[Bar]:
    """Two bars a (group, dtype), cases and decisions: half precision ties more often, each dtype has its own cap."""
    bars = []
    if not len(verdicts):
        return bars
    caps, reason = thresholds()["tied_decisions"], "a comparator that calls everything a tie excuses everything"
    for key, rows in verdicts.groupby([*GROUP, "dtype"], sort=True):
        operation, oracle, candidate, _, dtype = key
        if len(rows) < FEWEST_FOR_A_SHARE:
            continue
        where = f"{operation} in {dtype}, {candidate} against {oracle}"
        cap, share = tied_cases(operation).get(dtype, 0.0), float((rows["verdict"] == "tie").mean())
        bars.append(Bar(f"tied cases of {where}", cap, share, share <= cap, reason))
        decisions = int(rows["decisions"].sum())
        if decisions:
            cap, share = caps[dtype], float(rows["tied_decisions"].sum() / decisions)
            bars.append(Bar(f"tied decisions of {where}", cap, share, share <= cap, reason))
    return bars


def _tried_bars(verdicts: pd.DataFrame, plan: Plan | None) -> list[Bar]:
    """Every pair of the plan was tried: a pair that silently drops out is a failure, not a pass."""
    bars = []
    if plan is None or not plan.parity:
        return bars
    for operation, oracle in plan.pairs():
        for candidate in plan.candidates_of(operation):
            own = {"operation": operation, "oracle": oracle, "candidate": candidate}
            tried = int(verdicts[list(own)].eq(own).all(axis=1).sum()) if len(verdicts) else 0
            bars.append(
                Bar(
                    f"cases of {operation}, {candidate} against {oracle}",
                    plan.examples,
                    tried,
                    tried >= plan.examples,
                    "a pair of operation and oracle that was not tried has not held",
                )
            )
    return bars


def _measured_bars(measurements: pd.DataFrame) -> list[Bar]:
    import pandas as pd

    table, bars = thresholds(), []
    for row in measurements.to_dict("records"):
        where = f"{row['operation']} {row['workload']} {row['direction']}, {row['candidate']} against {row['oracle']}"
        if not row["pairs"]:
            bars.append(Bar(f"measurement of {where}", 1, 0, False, row["note"]))
            continue
        if row["candidate"] not in BUILT_IN:
            told = row.get("dishonest") or "its timed call answers as the judged one does"
            bars.append(
                Bar(f"honesty of {where}", 0, float(bool(row.get("dishonest"))), not row.get("dishonest"), told)
            )
            continue
        for bar in table["speed"]:
            if _applies(bar, row) and row["verdict"] in DECIDABLE:
                ok = row["speedup_high"] >= bar["at_least"]
                bars.append(Bar(f"speed of {where}", bar["at_least"], row["speedup"], ok, bar["reason"]))
        for bar in table["memory"]:
            if _applies(bar, row) and pd.notna(row["peak_bytes_oracle"]):
                own = row["output_bytes"] if bar["beyond_outputs"] else 0
                oracle = max(row["peak_bytes_oracle"] - own, 1)
                value = max(row["peak_bytes_candidate"] - own, 0) / oracle
                bars.append(Bar(f"memory of {where}", bar["at_most"], value, value <= bar["at_most"], bar["reason"]))
    return bars


def _applies(bar: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a bar speaks of a measurement; a pattern that it does not give is any."""
    names = ("operation", "oracle", "workload", "device", "direction")
    spared = row["operation"] in bar.get("except", ())
    return not spared and all(fnmatchcase(row[name], bar.get(name, "*")) for name in names)


def _measurements(measurements: pd.DataFrame) -> list[dict[str, Any]]:
    import pandas as pd

    identity = ["operation", "oracle", "candidate", "device", "workload", "direction"]
    return [
        {name: row[name] if pd.notna(row[name]) else None for name in [*identity, *MEASURED]}
        for row in measurements.to_dict("records")
    ]


def _sentence(
    operations: list[dict[str, Any]], failed: int, code: int, lost: tuple[str, ...], plan: Plan | None
) -> str:
    cases = sum(row["cases"] for row in operations)
    names, oracles = ({row[key] for row in operations} for key in ("operation", "oracle"))
    tried = f"{_count(cases, 'case')} of {_count(len(names), 'operation')} against {_count(len(oracles), 'oracle')}"
    if code == NOTHING_TRIED:
        return "Nothing was tried."
    if code == INTERRUPTED and plan is None:
        return "The run was interrupted; continue it with --into."
    if code == INTERRUPTED:
        return f"The run was interrupted after {tried}; continue it with --resume."
    if code == INCOMPLETE:
        return f"The run could not be completed ({'; '.join(lost)}); {tried} were judged."
    mismatches = sum(row["mismatch"] for row in operations)
    if failed:
        return f"Parity or a bar fell: {failed} failed ({_count(mismatches, 'mismatch', 'es')}) in {tried}."
    if not operations:
        return "No case was judged, only measurements were taken; no bar fell."
    return f"Parity holds: {tried}, no mismatch."


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
