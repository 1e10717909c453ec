"""From two results to a verdict: rejections, structure, side effects, then the operation's own comparator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from harness.divergences import Dispute, excuse
from harness.verdict import DTYPE, HOLDS, Evidence, Finding

if TYPE_CHECKING:
    from cases.case import Case
    from harness.execute import Result
    from harness.operation import Operation, Tensors


def judge(
    operation: Operation,
    case: Case,
    oracle: Result,
    truth: Result,
    candidate: Result,
    quantities: Callable[[Tensors], Tensors],
    era: dict[str, object],
    oracle_name: str,
) -> tuple[Finding, str]:
    """The finding on one candidate, and the id of the listed divergence that explains it, or ""."""
    if candidate.error and candidate.error.out_of_memory:
        return Finding("out-of-memory", candidate.error.text), ""
    if oracle.error and oracle.error.out_of_memory:
        return Finding("out-of-memory", f"oracle: {oracle.error.text}"), ""
    finding = _judge(operation, case, oracle, truth, candidate, quantities, era)
    if finding.verdict in HOLDS:
        return finding, ""
    divergence = excuse(Dispute(operation, case, oracle, candidate, finding), oracle_name)
    if divergence is None:
        return finding, ""
    return replace(finding, verdict="known-divergence", detail=divergence.reason), divergence.id


def _judge(operation, case, oracle, truth, candidate, quantities, era) -> Finding:
    if candidate.side_effects:
        return Finding("mismatch", "; ".join(candidate.side_effects), output="side effects")
    if oracle.error and candidate.error:
        return _both_reject(operation, oracle, candidate)
    if oracle.error:
        return Finding("oracle-error", f"oracle rejects ({oracle.error.text}), candidate accepts", "rejection")
    if candidate.error:
        return Finding("candidate-error", candidate.error.text, "rejection")
    problem = _structure(operation, oracle.outputs, candidate.outputs)
    if problem:
        return Finding("mismatch", problem, "structure")
    problem = operation.invariants(case, candidate.outputs)
    if problem:
        return Finding("mismatch", problem, "invariants")
    theirs = {name: value.to(candidate.outputs[name].dtype) for name, value in oracle.outputs.items()}
    finding = operation.compare(
        Evidence(
            operation,
            case,
            theirs,
            None if truth.error else truth.outputs,
            candidate.outputs,
            quantities,
            era,
        )
    )
    problem = _dtypes(operation, oracle.outputs, candidate.outputs)
    if problem and finding.verdict in HOLDS:
        return replace(finding, verdict="mismatch", detail=problem, output=DTYPE)
    return finding


def _both_reject(operation: Operation, oracle: Result, candidate: Result) -> Finding:
    if any(name in candidate.error.text for name in operation.rejectable):
        return Finding("both-reject", candidate.error.text)
    return Finding(
        "candidate-error",
        f"rejects as the oracle does ({oracle.error.text}), but the message names no argument: {candidate.error.text}",
        "rejection",
    )


def _structure(operation: Operation, oracle: Tensors, candidate: Tensors) -> str | None:
    for output in operation.outputs:
        if output.name not in candidate:
            return f"output {output.name} is missing; got {', '.join(candidate) or 'nothing'}"
        ours, theirs = candidate[output.name], oracle[output.name]
        if not isinstance(ours, torch.Tensor):
            return f"output {output.name} is {type(ours).__name__}, not a tensor"
        if ours.shape != theirs.shape:
            return f"output {output.name} has shape {tuple(ours.shape)}, the oracle's {tuple(theirs.shape)}"
        if ours.is_floating_point() and not theirs.is_floating_point():
            return f"output {output.name} has dtype {ours.dtype}, the oracle's {theirs.dtype}"
    return None


def _dtypes(operation: Operation, oracle: Tensors, candidate: Tensors) -> str | None:
    """Another dtype than the oracle's is said last: first the values are compared, in the candidate's dtype."""
    for output in operation.outputs:
        ours, theirs = candidate[output.name].dtype, oracle[output.name].dtype
        if ours != theirs:
            return f"output {output.name} has dtype {ours}, the oracle's {theirs}"
    return None
