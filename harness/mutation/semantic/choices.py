"""Operators on decisions: comparisons, extrema, ties, masks and padding, what is left in memory, and gradients."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from harness.mutation.semantic.registry import operator
from harness.mutation.semantic.source import Edit, Source, argument, callee, number, receiver

BOUNDARY = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
REVERSED = {ast.Lt: ">", ast.LtE: ">=", ast.Gt: "<", ast.GtE: "<="}
EXTREMA = {
    "maximum": "minimum", "minimum": "maximum", "_maximum": "_minimum", "_minimum": "_maximum", "amax": "amin",
    "amin": "amax", "argmax": "argmin", "argmin": "argmax", "max": "min", "min": "max",
}  # fmt: skip
FILLERS = {"zeros": "ones", "new_zeros": "new_ones", "zeros_like": "ones_like"}


def host_test(source: Source, node: ast.AST) -> bool:
    """Whether a comparison is of numbers of the host and picks a way, not an element."""
    if source.in_kernel(node):
        return False
    parent = source.parents[node]
    while isinstance(parent, ast.BoolOp | ast.UnaryOp):
        node, parent = parent, source.parents[parent]
    if isinstance(parent, ast.If | ast.While | ast.IfExp) and parent.test is node:
        return True
    return isinstance(parent, ast.comprehension | ast.Assign) and isinstance(node, ast.BoolOp)


def _comparison(source: Source, node: ast.Compare, table: dict) -> Edit | None:
    if len(node.ops) != 1 or type(node.ops[0]) not in table or host_test(source, node) or source.shares_work(node):
        return None
    if source.in_kernel(node) and (_in_loop_test(source, node) or ast.unparse(node.left).isupper()):
        return None
    start, stop = source.span(node.left)[1], source.span(node.comparators[0])[0]
    between = source.text[start:stop]
    old = next(sign for sign in ("<=", ">=", "<", ">") if sign in between)
    at = start + between.index(old)
    return Edit(at, at + len(old), table[type(node.ops[0])])


def _in_loop_test(source: Source, node: ast.AST) -> bool:
    """Whether a kernel goes on while the comparison holds: another one would never end."""
    while isinstance(parent := source.parents[node], ast.expr):
        node = parent
    return isinstance(parent, ast.While) and parent.test is node


def _is_lane_mask(source: Source, node: ast.Compare) -> bool:
    """Whether a comparison tells lanes of a tile from those beyond its end."""
    plain = isinstance(node.left, ast.Name) and isinstance(node.comparators[0], ast.Name)
    return source.in_kernel(node) and plain and isinstance(node.ops[0], ast.Lt)


@operator("boundary")
def move_boundaries(source: Source) -> Iterator[Edit]:
    """A comparison is strict where it should not be, or the other way round.

    Stands for points on an edge counted as inside, ties decided the other way, and one element of padding read.
    """
    for node in source.every(ast.Compare):
        edit = _comparison(source, node, BOUNDARY)
        if edit is not None:
            yield edit


@operator("direction")
def reverse_comparisons(source: Source) -> Iterator[Edit]:
    """A comparison has the wrong direction: inside is outside, the smaller is taken for the larger.

    Stands for exchanged arguments of a comparison.
    """
    for node in source.every(ast.Compare):
        edit = _comparison(source, node, REVERSED)
        if edit is not None and not _is_lane_mask(source, node):
            yield edit


@operator("extremum")
def exchange_extrema(source: Source) -> Iterator[Edit]:
    """The least is taken for the largest: hull for overlap, worst for best, and top-k from the wrong end.

    Stands for `min` and `max` exchanged, and for `largest` and `descending` forgotten.
    """
    for call in source.every(ast.Call):
        name = callee(call)
        if source.shares_work(call):
            continue
        if name in EXTREMA and not _is_clamp(call) and not _is_host_extremum(source, call):
            _, stop = source.span(call.func)
            yield Edit(stop - len(name), stop, EXTREMA[name])
        elif name == "topk":
            yield _other_end(source, call, "largest", present="largest=True", absent="largest=False")
        elif name == "sort" and argument(call, None, "descending") is not None:
            yield _other_end(source, call, "descending", present="descending=False", absent="")
    for node in source.every(ast.Constant):
        if node.value in ("amax", "amin"):
            yield source.put(node, '"amin"' if node.value == "amax" else '"amax"')


def _is_clamp(call: ast.Call) -> bool:
    return len(call.args) == 2 and any(number(part) is not None for part in call.args) and receiver(call) is None


def _is_host_extremum(source: Source, call: ast.Call) -> bool:
    """Whether the extremum is Python's own, of sizes."""
    return isinstance(call.func, ast.Name) and call.func.id in ("max", "min")


def _other_end(source: Source, call: ast.Call, name: str, *, present: str, absent: str) -> Edit:
    for keyword in call.keywords:
        if keyword.arg == name:
            return source.put(keyword, present)
    _, stop = source.span(call)
    return Edit(stop - 1, stop - 1, f", {absent}")


@operator("tie")
def reverse_ties(source: Source) -> Iterator[Edit]:
    """Among equal ones another is taken: the sort is not stable, the running count goes from the end.

    Stands for decisions that change with the device or the release, because nothing says which of equals wins.
    """
    for keyword in source.every(ast.keyword):
        if keyword.arg == "stable":
            yield source.put(keyword, "stable=False")
    for call in source.every(ast.Call):
        value = receiver(call)
        if value is None or source.shares_work(call) or source.in_kernel(call):
            continue
        if callee(call) == "cumsum" and _is_room(source.parents[call]):
            text = source.segment(call)
            head = source.segment(value)
            yield source.put(call, f"{head}.flip(-1){text[len(head) :]}.flip(-1)")
        elif callee(call) in ("argmin", "argmax") and call.args and number(call.args[0]) is not None:
            axis, head = source.segment(call.args[0]), source.segment(value)
            last = f"{head}.shape[{axis}] - 1 - {head}.flip({axis}).{callee(call)}({axis})"
            yield source.put(call, f"({last})")


def _is_room(node: ast.AST) -> bool:
    """Whether a running count is compared with the room that is left."""
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.LtE)


@operator("padding")
def ignore_masks(source: Source) -> Iterator[Edit]:
    """A mask is not applied, or one of its conditions is forgotten, or what is read in its place is another number.

    Stands for padding rows that win anchors, ignored anchors that are trained, background with a box term, and lanes
    beyond the end of a tile.
    """
    for call in source.every(ast.Call):
        if source.shares_work(call):
            continue
        name, value = callee(call), receiver(call)
        if name in ("masked_fill", "masked_fill_") and value is not None:
            yield source.keep(call, value)
        elif name == "where" and len(call.args) == 3:
            chosen, other = call.args[1], call.args[2]
            if number(other) is not None or "inf" in ast.unparse(other):
                yield source.keep(call, chosen)
            elif number(chosen) is not None:
                yield source.keep(call, other)
        elif name == "load":
            yield from _other_numbers(source, call)
    for node in source.every(ast.BinOp):
        if isinstance(node.op, ast.BitAnd) and not source.shares_work(node) and not _is_bits(node):
            yield source.keep(node, node.left)
            yield source.keep(node, node.right)
    for node in source.every(ast.AugAssign):
        if isinstance(node.op, ast.BitAnd):
            yield source.put(node, "pass")


def _is_bits(node: ast.BinOp) -> bool:
    """Whether bits are taken out of a number, rather than two conditions joined."""
    sides = (node.left, node.right)
    return any(number(side) is not None or getattr(side, "id", "").isupper() for side in sides)


def _other_numbers(source: Source, call: ast.Call) -> Iterator[Edit]:
    """Only what stands for nothing (infinity, NaN, -1) must be that: a masked 0 meets another mask further on."""
    other = argument(call, None, "other")
    if other is not None and number(other) in (None, -1):
        yield source.put(other, "0.0" if number(other) is None else "0")


@operator("stale")
def leave_memory_stale(source: Source) -> Iterator[Edit]:
    """What should begin at zero holds something else: here ones, so that every run sees the same.

    Stands for buffers that are allocated without being cleared, or used again from an earlier call.
    """
    for call in source.every(ast.Call):
        if source.shares_work(call) or source.in_kernel(call):
            continue
        name = callee(call)
        start, stop = source.span(call)
        if name == "zeros" and isinstance(call.func, ast.Attribute) and source.segment(call.func) == "runtime.zeros":
            yield Edit(start, stop, f"{source.segment(call)}.fill_(1)")
        elif name in FILLERS and source.segment(call.func) != "np.zeros":
            _, end = source.span(call.func)
            yield Edit(end - len(name), end, FILLERS[name])
        elif name == "zero_" and receiver(call) is not None:
            yield source.keep(call, receiver(call))
        elif name in ("full", "new_full", "full_like") and source.segment(call.func) != "np.full":
            filler = call.args[1] if len(call.args) > 1 else None
            if number(filler) in (0, -1) or (filler is not None and "inf" in ast.unparse(filler)):
                yield source.put(filler, "1")


@operator("gradient")
def change_gradients(source: Source) -> Iterator[Edit]:
    """A gradient flows where none should: `detach` and `no_grad` are forgotten.

    Stands for losses that train their own targets, and assigners that keep the graph alive.
    """
    for call in source.every(ast.Call):
        value = receiver(call)
        if callee(call) not in ("detach", "detach_") or value is None or source.in_static(call):
            continue
        if ".long()" not in ast.unparse(source.statement(call)):  # integers have none
            yield source.keep(call, value)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if ast.unparse(decorator) == "torch.no_grad()":
                    yield source.without_line(decorator)
        if isinstance(node, ast.withitem) and ast.unparse(node.context_expr) == "torch.no_grad()":
            yield source.put(node.context_expr, "torch.set_grad_enabled(torch.is_grad_enabled())")
