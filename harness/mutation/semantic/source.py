"""The text of a file with its syntax tree: what may be mutated in it, and edits of exact segments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

CHECKS = re.compile(r"^_{0,2}(check|expect|fake|readable|choose_path|take_sparse|find_triton|describe|why_not)")
"""Functions that refuse bad arguments, or tell compilers shapes: the syntactic operators mutate them."""
REFUSALS = ("_assert_async",)
SIZES = re.compile(
    r"^_?(BLOCK\w*|\w*CHUNK\w*|\w*ELEMENTS\w*|\w*ENTRIES\w*|_FEW|ROWS|MIN_ROWS|PAIRS|PARTS|PLACES|SUMS|COLUMNS|CLASSES"
    r"|\w*_BLOCK|FINISH_\w+|\w+_(ANCHORS|ROWS|CLASSES)|_FAR|_SLACK|MAX_\w+|HARMLESS|PLANES|MOST|_PIXELS|_TENSORS|_DENSE_SIDE|IGNORED|LOW_HALF|TILES|_PAIRS_A_THREAD|_A_LAUNCH|LONGEST_SIDE|MINIMUM|_LINEAR_FROM|warps|get_num_threads|_wanted"
    r"|rows_a_program)$"
)
"""Names whose values only share work out: nudging them changes no result."""
SHARING = frozenset({"step", "size", "steps", "warps", "num_warps", "wanted", "block", "some_images", "some_anchors"})
"""Variables that hold such a share."""


@dataclass(frozen=True)
class Edit:
    """Another text for one segment of a file: `start` and `stop` are places in its characters."""

    start: int
    stop: int
    text: str


class Source:
    """A file's text, and the nodes of its tree that a semantic operator may touch.

    Left alone are docstrings, annotations, imports, texts, refusals of arguments with their conditions, what only
    shares work out in blocks, and the shapes that compilers are told.
    """

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.tree = ast.parse(text)
        self._starts = [0]
        for line in text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._lines = text.splitlines(keepends=True)
        self.parents: dict[ast.AST, ast.AST] = {}
        self.function: dict[ast.AST, ast.FunctionDef | None] = {}

    def place(self, line: int, column: int) -> int:
        """Where in the text a line (from 1) and a column in UTF-8 bytes lie, as the tree gives them."""
        prefix = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(prefix)

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where the segment of a node begins and ends."""
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def segment(self, node: ast.AST) -> str:
        """The text of a node."""
        start, stop = self.span(node)
        return self.text[start:stop]

    def line_of(self, place: int) -> int:
        """The line (from 1) of a place in the text."""
        return self.text.count("\n", 0, place) + 1

    def put(self, node: ast.AST, text: str) -> Edit:
        """The edit that gives a node another text, in brackets where the text needs them."""
        return Edit(*self.span(node), text)

    def keep(self, node: ast.AST, part: ast.AST) -> Edit:
        """The edit that leaves of a node only one of its parts, in brackets unless that stands by itself."""
        text = self.segment(part)
        plain = isinstance(part, ast.Name | ast.Constant | ast.Call | ast.Subscript | ast.Attribute)
        alone = isinstance(self.parents.get(node), ast.Assign | ast.Return | ast.keyword | ast.AugAssign)
        return self.put(node, text if plain or alone else f"({text})")

    def without_line(self, node: ast.AST) -> Edit:
        """The edit that takes the line of a node out."""
        return Edit(self._starts[node.lineno - 1], self._starts[node.lineno], "")

    def apply(self, edit: Edit) -> str:
        """The whole text with the edit in it."""
        return self.text[: edit.start] + edit.text + self.text[edit.stop :]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """The nodes that may be touched, in the order of the text."""
        return list(self._walk(self.tree, None))

    def every(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        """Those of some kinds."""
        return (node for node in self.nodes if isinstance(node, kinds))

    def in_kernel(self, node: ast.AST) -> bool:
        """Whether a node belongs to a Triton kernel."""
        function = self.function.get(node)
        return function is not None and self.is_kernel(function)

    def is_kernel(self, function: ast.FunctionDef) -> bool:
        """Whether a function is compiled by Triton."""
        return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)

    def function_at(self, place: int) -> ast.FunctionDef | None:
        """The innermost function around a place in the text; its decorators and defaults belong to it."""
        line, found = self.line_of(place), None
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first <= line <= node.end_lineno and (found is None or first >= found.lineno):
                    found = node
        return found

    def in_static(self, node: ast.AST) -> bool:
        """Whether a node belongs to the forward or backward of an autograd function, where nothing is recorded."""
        function = self.function.get(node)
        return function is not None and any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)

    def in_address(self, node: ast.AST) -> bool:
        """Whether a node says where a kernel reads or writes."""
        while (parent := self.parents.get(node)) is not None and isinstance(parent, ast.expr | ast.keyword):
            if isinstance(parent, ast.Call) and callee(parent) in ("load", "store") and parent.args[0] is node:
                return True
            node = parent
        return False

    def statement(self, node: ast.AST) -> ast.stmt:
        """The statement that a node is part of."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def shares_work(self, node: ast.AST) -> bool:
        """Whether a node's statement only shares work out: it reads a size of blocks, or sets a share of work."""
        if self.in_kernel(node):
            return False
        statement = self.statement(node)
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            return False
        if isinstance(statement, ast.For | ast.While | ast.If | ast.With):
            inner = [getattr(statement, "iter", None), getattr(statement, "test", None)]
            return any(_reads_size(part) for part in inner if part is not None)
        targets = getattr(statement, "targets", [])
        return _reads_size(statement) or any(isinstance(t, ast.Name) and t.id in SHARING for t in targets)

    def _walk(self, node: ast.AST, function: ast.FunctionDef | None) -> Iterator[ast.AST]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment", "ops", "ctx"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or _left_alone(child):
                    continue
                self.parents[child] = node
                self.function[child] = function
                if isinstance(child, ast.expr | ast.keyword | ast.stmt):
                    yield child
                inner = child if isinstance(child, ast.FunctionDef) else function
                yield from self._walk(child, inner)


def _left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert | ast.JoinedStr):
        return True
    if isinstance(node, ast.FunctionDef):
        return bool(CHECKS.match(node.name))
    if isinstance(node, ast.If):
        return len(node.body) == 1 and isinstance(node.body[0], ast.Raise)
    if isinstance(node, ast.Expr):
        value = node.value
        return isinstance(value, ast.Constant) or (isinstance(value, ast.Call) and callee(value) in REFUSALS)
    return False


def _reads_size(node: ast.AST) -> bool:
    for part in ast.walk(node):
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        if SIZES.match(name):
            return True
    return False


def callee(call: ast.Call) -> str:
    """The last name of what is called: `clamp` of `x.y.clamp(0)`."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def receiver(call: ast.Call) -> ast.expr | None:
    """The tensor whose method is called; None for functions of a module."""
    function = call.func
    if not isinstance(function, ast.Attribute):
        return None
    value = function.value
    return None if isinstance(value, ast.Name) and value.id in ("torch", "tl", "np", "functional", "math") else value


def argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    """An argument by its place or its keyword."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return call.args[place] if place is not None and len(call.args) > place >= 0 else None


def number(node: ast.expr | None) -> int | float | None:
    """The value of a literal number, a minus before it included; None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = number(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    return None


def names(node: ast.AST) -> set[str]:
    """All names and attributes in an expression."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
