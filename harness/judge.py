"""From two results to a verdict: rejections, structure, side effects, then the operation's own comparator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from harness.divergences import Dispute, excuse
from harness.operation import gradient_name
from harness.verdict import DTYPE, HOLDS, Evidence, Finding, Inquiry

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
    ask: Inquiry,
    oracle_name: str,
) -> tuple[Finding, str]:
    """The finding on one candidate, and the id of the listed divergence that explains it, or ""."""
    if candidate.error and candidate.error.out_of_memory:
        return Finding("out-of-memory", candidate.error.text), ""
    if oracle.error and oracle.error.out_of_memory:
        return Finding("out-of-memory", f"oracle: {oracle.error.text}"), ""
    finding = _judge(operation, case, oracle, truth, candidate, ask)
    if finding.verdict in HOLDS:
        return finding, ""
    divergence = excuse(Dispute(operation, case, oracle, candidate, finding), oracle_name)
    if divergence is None:
        return finding, ""
    return replace(finding, verdict="known-divergence", detail=divergence.reason), divergence.id


def _judge(operation, case, oracle, truth, candidate, ask) -> Finding:
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
    ours, theirs = (with_gradients(operation, case, result.outputs) for result in (candidate, oracle))
    finding = operation.compare(
        Evidence(
            operation,
            case,
            {name: value.to(ours[name].dtype) for name, value in theirs.items()},
            None if truth.error else with_gradients(operation, case, truth.outputs),
            ours,
            ask,
            truth.error.text if truth.error else "",
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


def _names(operation: Operation, oracle: Tensors) -> list[str]:
    """Outputs, and the gradients that upstream has."""
    gradients = map(gradient_name, operation.gradients)
    return [output.name for output in operation.outputs] + [name for name in gradients if name in oracle]


def _structure(operation: Operation, oracle: Tensors, candidate: Tensors) -> str | None:
    for name in _names(operation, oracle):
        if name not in candidate:
            return f"output {name} is missing; got {', '.join(candidate) or 'nothing'}"
        ours, theirs = candidate[name], oracle[name]
        if not isinstance(ours, torch.Tensor):
            return f"output {name} is {type(ours).__name__}, not a tensor"
        if ours.shape != theirs.shape:
            return f"output {name} has shape {tuple(ours.shape)}, the oracle's {tuple(theirs.shape)}"
        if ours.is_floating_point() and not theirs.is_floating_point():
            return f"output {name} has dtype {ours.dtype}, the oracle's {theirs.dtype}"
    return None


def _dtypes(operation: Operation, oracle: Tensors, candidate: Tensors) -> str | None:
    """Another dtype than the oracle's is said last: first the values are compared, in the candidate's dtype."""
    for name in _names(operation, oracle):
        ours, theirs = candidate[name].dtype, oracle[name].dtype
        if ours != theirs:
            return f"output {name} has dtype {ours}, the oracle's {theirs}"
    return None


def with_gradients(operation: Operation, case: Case, outputs: Tensors) -> Tensors:
    """The outputs with zeros for gradients that do not exist: a step with neither moves anything."""
    absent = {
        gradient_name(name): torch.zeros_like(case.tensors[name])
        for name in operation.carries_gradient(case.tensors)
        if gradient_name(name) not in outputs
    }
    return {**outputs, **absent}
