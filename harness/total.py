"""The comparator of totals: a loss with an assigner inside is judged under the decisions that were taken.

Where candidate and oracle decide alike, numbers are compared as they are, the truth being upstream in float64 under
those decisions. Where they differ, the assigner's own comparator says whether both are legal; then upstream is asked
again, in both precisions, with the candidate's decisions in the place of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from cases.case import Case
from harness import numeric
from harness.equality import in_float64
from harness.operation import Tensors
from harness.verdict import HOLDS, Evidence, Finding


@dataclass(frozen=True)
class Part:
    """The assigner inside a total."""

    operation: str
    """Its own operation: "tal", "simota" or "hungarian"."""
    decisions: tuple[str, ...]
    """The total's outputs that hold its decisions."""
    answer: Callable[[Tensors, dict[str, Any], Tensors, int], Tensors]
    """`answer(inputs, settings, outputs, index)`: what the assigner's `index`-th call must have answered, under its own
    output names, for the total's outputs to be what they are."""


def comparing(part: Part) -> Callable[[Evidence], Finding]:
    """The comparator of a total with this assigner."""

    def compare(evidence: Evidence) -> Finding:
        ours, theirs = _decisions(part, evidence.candidate), _decisions(part, evidence.oracle)
        count = sum(value.numel() for value in ours.values())
        if _equal(ours, theirs):
            finding = numeric.compare(_under(evidence, ours, part, again=False))
            return replace(finding, decisions=count)
        legal = _judge(part, evidence)
        tied = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
        if legal.verdict not in HOLDS:
            return replace(legal, decisions=count, tied=tied)
        finding = numeric.compare(_under(evidence, ours, part, again=True))
        if finding.verdict == "match":
            finding = replace(finding, verdict="tie", detail=legal.detail, output=", ".join(part.decisions))
        return replace(finding, decisions=count, tied=tied)

    return compare


def _decisions(part: Part, outputs: Tensors) -> Tensors:
    return {name: outputs[name] for name in part.decisions}


def _equal(ours: Tensors, theirs: Tensors) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def _under(evidence: Evidence, decisions: Tensors, part: Part, *, again: bool) -> Evidence:
    """The evidence with truth, and where asked the oracle `again`, under the given decisions."""
    truth, exact = evidence.truth, in_float64(evidence.case.tensors)
    if truth is not None and not _equal(decisions, _decisions(part, truth)):
        truth = evidence.evaluate(exact, decisions)
    oracle = evidence.evaluate(evidence.case.tensors, decisions) if again else evidence.oracle

    def evaluate(tensors: Tensors, assignment: Tensors | None = None) -> Tensors:
        # Inputs moved by a rounding keep the decisions: what numbers they imply is asked, not what they decide.
        return evidence.evaluate(tensors, decisions if assignment is None else assignment)

    # What other decisions imply is another memory.
    key = tuple((name, value.cpu().numpy().tobytes()) for name, value in decisions.items())
    memory = evidence.ask.memory.setdefault(key, {})
    ask = replace(evidence.ask, evaluate=evaluate, memory=memory)
    return replace(evidence, oracle=oracle, truth=truth, ask=ask)


def _judge(part: Part, evidence: Evidence) -> Finding:
    """Whether the candidate's decisions are legal, call by call of the assigner inside."""
    from harness.operations import operation as declaration

    operation = declaration(part.operation)
    asked = evidence.ask.assigner(evidence.case.tensors)
    details, finding = [], Finding("match")
    for index, (tensors, settings, answer) in enumerate(asked if isinstance(asked, list) else [asked]):
        case = Case(part.operation, dict(tensors), dict(settings), evidence.case.origin, frozenset())
        ours = part.answer(tensors, settings, evidence.candidate, index)
        problem = operation.invariants(case, ours)
        if problem:
            return Finding("mismatch", f"{part.operation}: {problem}", "invariants")
        inner = Evidence(operation, case, answer, None, ours, evidence.ask)
        finding = operation.compare(inner)
        if finding.verdict not in HOLDS:
            return replace(finding, detail=f"{part.operation} inside: {finding.detail}")
        if finding.detail:
            details.append(finding.detail)
    return replace(finding, detail=" | ".join(details))
