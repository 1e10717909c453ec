"""junit.xml: a suite an operation, oracle and candidate; a case for its parity, each failure, each bar."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from reports import headline, text
from reports.failures import Failure, failures
from reports.tables import operations

if TYPE_CHECKING:
    from reports.frames import Run


def render(run: Run) -> str:
    """The whole document; counts on every suite, control characters that XML has no place for stripped."""
    root = ElementTree.Element("testsuites", name="cleanroom")
    failing: dict[tuple[str, ...], list[Failure]] = defaultdict(list)
    for failure in failures(run):
        failing[failure.operation, failure.oracle, failure.candidate].append(failure)
    seconds = _seconds(run)
    parities = defaultdict(list)
    for row in operations(run):
        parities[tuple(text.clean(row[key]) for key in ("operation", "oracle", "candidate"))].append(row)
    for key in dict.fromkeys((*parities, *failing)):
        suite = ElementTree.SubElement(root, "testsuite", name=" / ".join(key))
        for row in parities[key]:
            device = text.clean(row["device"])
            _parity(suite, key, row, [failure for failure in failing[key] if failure.device == device])
        for failure in failing[key]:
            _failure(suite, key, failure)
        suite.set("time", f"{seconds.get(key, 0.0):.3f}")
    if run.summary is None:
        suite = ElementTree.SubElement(root, "testsuite", name="run")
        case = _case(suite, "run", "finished")
        ElementTree.SubElement(case, "error", type="unfinished", message=text.clean(" ".join(headline.notes(run))))
    elif run.summary["gate"]:
        _bars(ElementTree.SubElement(root, "testsuite", name="gate"), run.summary["gate"])
    for suite in root:
        _counts(suite, list(suite))
    _counts(root, list(root.iter("testcase")))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: ElementTree.Element, classname: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=text.clean(classname), name=text.clean(name))


def _parity(suite: ElementTree.Element, key: tuple[str, ...], row: dict, failing: list[Failure]) -> None:
    case = _case(suite, ".".join(key), f"parity on {row['device']}")
    share, cap = row["tie_share"], row.get("tie_cap")
    reasons = []
    if failing:
        reasons.append(f"{len(failing)} of {row['cases']} cases do not hold")
    elif row["mismatch"]:
        reasons.append(f"{row['mismatch']} of {row['cases']} cases are mismatches")
    if not (text.absent(share) or text.absent(cap)) and share > cap:
        reasons.append(f"ties are {text.share(share)} of all cases, above the cap of {text.share(cap)}")
    if reasons:
        ElementTree.SubElement(case, "failure", type="parity", message="; ".join(reasons))


def _failure(suite: ElementTree.Element, key: tuple[str, ...], failure: Failure) -> None:
    case = _case(suite, ".".join(key), f"{failure.case} {failure.dtype} on {failure.device}")
    kind = "failure" if failure.verdict == "mismatch" else "error"
    first = failure.detail.split("\n", 1)[0]
    outcome = ElementTree.SubElement(case, kind, type=failure.verdict, message=f"{failure.verdict}: {first}")
    lines = [failure.detail, f"origin: {failure.origin}", failure.command and f"replay: {failure.command}"]
    outcome.text = "\n".join(line for line in lines if line)


def _bars(suite: ElementTree.Element, bars: list[dict]) -> None:
    for bar in bars:
        case = _case(suite, "gate", text.anything(bar["bar"]))
        if not bar["ok"]:
            said = f"{text.anything(bar['value'])} against a limit of {text.anything(bar['limit'])}"
            message = text.clean(f"{said}: {text.anything(bar['reason'])}")
            ElementTree.SubElement(case, "failure", type="bar", message=message)


def _counts(suite: ElementTree.Element, cases: list[ElementTree.Element]) -> None:
    suite.set("tests", str(len(cases)))
    for kind in ("failure", "error"):
        suite.set(f"{kind}s", str(sum(case.find(kind) is not None for case in cases)))


def _seconds(run: Run) -> dict[tuple[str, ...], float]:
    if run.verdicts is None or run.verdicts.empty:
        return {}
    sums = run.verdicts.groupby(["operation", "oracle", "candidate"])["seconds"].sum()
    return {tuple(map(text.clean, key)): seconds for key, seconds in sums.items()}
