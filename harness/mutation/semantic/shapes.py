"""Operators on shapes: axes and broadcasting."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from harness.mutation.semantic.registry import operator
from harness.mutation.semantic.source import Edit, Source, callee, number, receiver

REDUCTIONS = frozenset(
    {"sum", "mean", "any", "all", "amax", "amin", "argmax", "argmin", "prod", "cumsum", "softmax", "log_softmax",
     "logsumexp", "topk", "flip", "max", "min", "sort"}
)  # fmt: skip
JOINS = frozenset({"cat", "stack"})
OTHER_AXIS = {-1: -2, -2: -1, 1: 0, 2: 1, 0: 1}


@operator("axis")
def change_axes(source: Source) -> Iterator[Edit]:
    """A reduction, a softmax, a running sum or a join goes along another axis.

    Stands for sums over anchors instead of classes, over images instead of anchors, and softmax over sides.
    """
    for call in source.every(ast.Call):
        if source.shares_work(call):
            continue
        axis = _axis(source, call)
        value = number(axis)
        if value in OTHER_AXIS and not (value == 0 and callee(call) != "flip" and not source.in_kernel(call)):
            yield source.put(axis, str(OTHER_AXIS[value]))


def _axis(source: Source, call: ast.Call) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg in ("dim", "axis"):
            return keyword.value
    name = callee(call)
    if name in JOINS:
        return call.args[1] if len(call.args) > 1 else None
    if name not in REDUCTIONS or name == "topk":
        return None
    if source.in_kernel(call):
        return call.args[1] if len(call.args) > 1 and receiver(call) is None and name in ("sum", "max", "min") else None
    return call.args[0] if call.args and receiver(call) is not None else None


@operator("broadcast")
def change_broadcasting(source: Source) -> Iterator[Edit]:
    """A tensor is broadcast along another axis, or one kept axis is lost.

    Stands for the N by N losses that a missing axis makes of two vectors.
    """
    for node in source.every(ast.Subscript):
        if source.in_kernel(node) or not isinstance(node.slice, ast.Tuple) or source.shares_work(node):
            continue
        parts = node.slice.elts
        if len(parts) == 2 and isinstance(parts[0], ast.Slice) and _is_none(parts[1]) and parts[0].lower is None:
            yield source.put(node.slice, "None")
    for keyword in source.every(ast.keyword):
        if keyword.arg in ("keepdim", "keepdims"):
            yield source.put(keyword, f"{keyword.arg}=False")
    for call in source.every(ast.Call):
        if callee(call) == "unsqueeze" and receiver(call) is not None and call.args:
            value = number(call.args[0])
            if value in (1, -1, 2):
                yield source.put(call.args[0], str({1: 0, -1: 0, 2: 1}[value]))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
