"""Operators on numbers: constants, clamps, counts of the largest, factors, normalisers and dtypes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from harness.mutation.semantic.registry import operator
from harness.mutation.semantic.source import SIZES, Edit, Source, argument, callee, names, number, receiver

TINY = 1e-4
"""Below it a number is an epsilon, and matters by its order of magnitude."""
COUNTS = frozenset({"topk", "topk2", "count", "k"})
CHOOSERS = frozenset({"topk", "largest", "_largest", "_filling", "lowest", "dynamic_k", "_choose_free"})
FACTORS = re.compile(
    r"^(\w*strides?|scale|weights?|\w*_weight|\w*gains?|factor|alpha|gamma|\w*_cost|pixel|ASPECT|_ASPECT|IOU_WEIGHT"
    r"|by_\w+|grad|slopes?|own_score|best_overlap|target|modulation|quality|images|share|modulating|sign)$"
)
NORMALISERS = re.compile(
    r"^(\w*normaliser\w*|target_scores_sum|union|hull|divisor|of_class|positives|ground_truths|\w*total|diagonal"
    r"|queries|best_metric|divide\w*|width|height|eos_sum|count|D)$"
)
PLACES = re.compile(r"^(images|queries|\w+_stride|s_\w+|by_(image|query|row|column|channel|anchor|value|layer|side))$")
"""Factors of addresses in kernels."""


def nudged(value: int | float) -> str:
    """Another number, far enough from the given one to matter."""
    if isinstance(value, int):
        return str(value + 1)
    if value == 0:
        return "0.1"
    factor = 1000 if abs(value) < TINY else 1.1
    return repr(float(f"{value * factor:.8g}"))


@operator("constant")
def nudge_constants(source: Source) -> Iterator[Edit]:
    """A constant of the formula is another one: the wrong epsilon, exponent, gain, radius or penalty, or 0.5 is 0.55.

    Stands for constants copied from another paper, release or era, and for defaults that moved.
    """
    for node in source.every(ast.Constant, ast.UnaryOp):
        value = number(node)
        if value is None or isinstance(source.parents[node], ast.UnaryOp) or source.shares_work(node):
            continue
        if _is_default(source, node) or _is_named(source, node) or _is_arithmetic(source, node, value):
            text = nudged(value)
            yield source.put(node, f"({text})" if text.startswith("-") else text)


def _is_default(source: Source, node: ast.AST) -> bool:
    """A default of a parameter or of a field."""
    parent = source.parents[node]
    if isinstance(parent, ast.arguments):
        return isinstance(number(node), float) or number(node) > 1
    return isinstance(parent, ast.AnnAssign)


def _is_named(source: Source, node: ast.AST) -> bool:
    """The value of a module's constant."""
    statement = source.statement(node)
    if source.function.get(node) is not None or not isinstance(statement, ast.Assign):
        return False
    if any(sign in ast.unparse(statement) for sign in ("<<", "2 **")) and "math" not in ast.unparse(statement):
        return False  # bits of a packed key
    target = statement.targets[0]
    named = [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
    return bool(named) and all(name.isupper() for name in named) and not any(SIZES.match(name) for name in named)


def _is_arithmetic(source: Source, node: ast.AST, value: int | float) -> bool:
    """A fraction, or a small divisor or power, in the arithmetic of values."""
    parent = source.parents[node]
    inside = source.function.get(node) is not None
    if (
        isinstance(parent, ast.Call)
        and callee(parent) in ("mul_", "div_", "div", "mul", "add_")
        and value not in (0, 1, -1)
    ):
        return inside
    if isinstance(parent, ast.keyword) and parent.arg == "alpha":
        return inside and isinstance(value, float)
    if not isinstance(parent, ast.BinOp) or not inside:
        return False
    if isinstance(value, float):
        return value not in (0.0, 1.0)
    return isinstance(parent.op, ast.Div) and parent.right is node and value > 1


@operator("clamp")
def move_clamps(source: Source) -> Iterator[Edit]:
    """A clamp is dropped: negative sides multiply to an overlap, a normaliser falls below 1, an index leaves its range.

    Stands for the clamp that was forgotten, or that was applied to another quantity than the specification's.
    """
    for call in source.every(ast.Call):
        if source.shares_work(call):
            continue
        name, value = callee(call), receiver(call)
        if name in ("clamp", "clamp_") and value is not None:
            yield source.keep(call, value)
        elif name in ("maximum", "minimum", "_maximum", "_minimum", "max", "min") and len(call.args) == 2:
            if name in ("max", "min") and value is not None:
                continue
            bound = [number(part) for part in call.args]
            if bound[0] is None and bound[1] is not None:
                yield source.keep(call, call.args[0])
            elif bound[0] is not None and bound[1] is None:
                yield source.keep(call, call.args[1])


@operator("clamp-bound")
def move_clamp_bounds(source: Source) -> Iterator[Edit]:
    """The bound of a clamp is another one: R - 1 for R - 1.01, 0 for 1.

    Stands for the off-by-one of the last bin and of the last class.
    """
    for call in source.every(ast.Call):
        if callee(call) not in ("clamp", "clamp_") or source.shares_work(call):
            continue
        for bound in [*call.args, *(keyword.value for keyword in call.keywords)]:
            value = number(bound)
            if value is None and not isinstance(bound, ast.UnaryOp):
                yield source.put(bound, f"({source.segment(bound)}) - 1")
                break
            if value not in (None, 0):
                yield source.put(bound, str(value - 1) if isinstance(value, int) else nudged(value))
                break


@operator("count")
def change_counts(source: Source) -> Iterator[Edit]:
    """One candidate less is chosen, or one more.

    Stands for the off-by-one of top-k: `topk` clipped to the number of anchors less one, dynamic k truncated early.
    """
    for call in source.every(ast.Call):
        if callee(call) not in CHOOSERS or source.shares_work(call):
            continue
        own = receiver(call)
        for part in call.args[0 if own is not None else 1 :]:
            if names(part) & (COUNTS | {"OVERLAPS_FOR_K"}) and number(part) is None:
                text = source.segment(part)
                yield source.put(part, f"{text} - 1")
                yield source.put(part, f"{text} + 1")
                break


@operator("factor")
def drop_factors(source: Source) -> Iterator[Edit]:
    """A factor is forgotten: the stride of a decoded box, a gain, a weight, the gradient that comes in.

    Stands for distances left in cells, losses without their gain or target score, and backward passes that ignore
    what they are multiplied with (a scaler's factor, another reduction).
    """
    for node in source.every(ast.BinOp):
        if isinstance(node.op, ast.Mult) and not source.shares_work(node):
            for part, rest in ((node.right, node.left), (node.left, node.right)):
                if _named_like(part, FACTORS) and not _addresses(source, node, part):
                    yield source.keep(node, rest)
                    break
    for call in source.every(ast.Call):
        value = receiver(call)
        if callee(call) not in ("mul_", "mul") or value is None or len(call.args) != 1 or source.shares_work(call):
            continue
        if _named_like(call.args[0], FACTORS):
            yield source.keep(call, value)
    for node in source.every(ast.AugAssign):
        if isinstance(node.op, ast.Mult) and not source.shares_work(node):
            yield source.put(node, "pass")


def _addresses(source: Source, node: ast.AST, factor: ast.AST) -> bool:
    """Whether a product in a kernel counts elements rather than values."""
    return source.in_kernel(node) and (source.in_address(node) or bool(PLACES.match(ast.unparse(factor))))


def _named_like(node: ast.AST, pattern: re.Pattern) -> bool:
    """Whether an operand is a name, an element or a broadcast of one that fits."""
    while isinstance(node, ast.Subscript | ast.Call):
        if isinstance(node, ast.Call):
            node = receiver(node) or ast.Constant(0)
        elif isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            return True
        else:
            node = node.value
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return bool(pattern.match(name))


@operator("normaliser")
def change_normalisers(source: Source) -> Iterator[Edit]:
    """A loss is not divided by its normaliser, or a sum is a mean and a mean a sum.

    Stands for the loss that scales with the batch, with the number of anchors or with the positives of one image.
    """
    for node in source.every(ast.BinOp):
        if isinstance(node.op, ast.Div) and not source.shares_work(node) and _named_like(node.right, NORMALISERS):
            yield source.keep(node, node.left)
    for call in source.every(ast.Call):
        value = receiver(call)
        if callee(call) in ("div_", "div") and value is not None and len(call.args) == 1:
            if _named_like(call.args[0], NORMALISERS):
                yield source.keep(call, value)
        elif callee(call) in ("sum", "mean") and value is not None and not call.keywords and not source.in_kernel(call):
            other = "mean" if callee(call) == "sum" else "sum"
            if _sums_values(source, call, value):
                _, stop = source.span(call.func)
                yield Edit(stop - len(callee(call)), stop, other)


def _sums_values(source: Source, call: ast.Call, value: ast.expr) -> bool:
    """Whether it is values that are summed, rather than a mask that is counted (a mean of which would not run)."""
    if source.shares_work(call) or "isfinite" in ast.unparse(source.statement(call)):
        return False
    if isinstance(source.parents[call], ast.Compare):
        return False  # its sign is all that counts
    return not any(isinstance(part, ast.Compare) for part in ast.walk(value)) and not names(value) & {
        "mask", "columns", "candidate", "chosen", "proposed", "above", "below", "fg_mask", "found", "kept", "real",
        "positive", "lap", "num_gt", "positives", "some", "ignored", "sizes", "equal", "valid", "counts",
    }  # fmt: skip


WIDE = {"double": "float", "float64": "float32"}


@operator("dtype")
def narrow_dtypes(source: Source) -> Iterator[Edit]:
    """A cast is dropped, or goes to the narrower dtype: half stays half, a sum in float64 is one in float32.

    Stands for losses that overflow or lose small gradients under mixed precision, and for results in another dtype
    than upstream's.
    """
    for call in source.every(ast.Call):
        name, value = callee(call), receiver(call)
        if value is None or source.shares_work(call):
            continue
        if name == "double" and not call.args:
            _, stop = source.span(call.func)
            yield Edit(stop - len(name), stop, "float")
        elif (name in ("float", "half") and not call.args) or (
            name == "to" and call.args and not _keeps_values(source, call)
        ):
            yield source.keep(call, value)
    for node in source.every(ast.Attribute):
        if node.attr == "float64" and not source.in_kernel(node) and not _is_compared(source, node):
            yield source.put(node, source.segment(node).replace("float64", "float32"))


def _keeps_values(source: Source, call: ast.Call) -> bool:
    """Whether a cast goes to a device, widens an address, or gives bits another name."""
    target = ast.unparse(call.args[0])
    if "device" in target or argument(call, None, "bitcast") is not None:
        return True
    return source.in_kernel(call) and (target not in ("tl.float32", "tl.float64", "TYPE") or source.in_address(call))


def _is_compared(source: Source, node: ast.AST) -> bool:
    """Whether a dtype is only asked for."""
    parent = source.parents[node]
    while isinstance(parent, ast.Tuple):
        parent = source.parents[parent]
    return isinstance(parent, ast.Compare | ast.Dict | ast.arguments)
