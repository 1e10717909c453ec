"""Syntactic mutants: the node operators of mutmut 3, without its runner.

Left out are texts (strings, docstrings, what `raise` says), what is no computation (annotations, decorators), and
arguments replaced by None or dropped from the middle of a call: twenty thousand mutants of which nearly every one ends
in a TypeError would pad the score and prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import libcst as cst
from libcst.metadata import MetadataWrapper, WhitespaceInclusivePositionProvider
from mutmut.mutation import mutators

from harness.mutation.mutant import Mutant, changed, distinct

TEXTS = (
    mutators.operator_string,
    mutators.operator_symmetric_string_methods_swap,
    mutators.operator_unsymmetrical_string_methods_swap,
)
OPERATORS = tuple((kind, operator) for kind, operator in mutators.mutation_operators if operator not in TEXTS)
PASSED_OVER = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise, cst.FormattedString)


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """The mutants of one file, in the order of its lines."""
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    collector = _Collector(file, source, wrapper.module)
    wrapper.visit(collector)
    yield from distinct(collector.found, source)


class _Collector(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (WhitespaceInclusivePositionProvider,)

    def __init__(self, file: str, source: str, module: cst.Module) -> None:
        super().__init__()
        self.found: list[Mutant] = []
        self._file, self._source, self._module = file, source, module
        self._starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, PASSED_OVER) or _says_strict(node):
            return False
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                name = operator.__name__.removeprefix("operator_")
                for replacement in operator(node):
                    if operator is not mutators.operator_arg_removal or _optional_dropped(node, replacement):
                        self._add(name, node, replacement)
        return True

    def _add(self, operator: str, node: cst.CSTNode, replacement: cst.CSTNode) -> None:
        place = self.get_metadata(WhitespaceInclusivePositionProvider, node)
        start, end = (self._starts[at.line - 1] + at.column for at in (place.start, place.end))
        text = self._module.code_for_node(replacement)
        source = self._source[:start] + text + self._source[end:]
        self.found.append(Mutant("syntactic", operator, self._file, *changed(self._source, source), source))


def _optional_dropped(call: cst.Call, replacement: cst.Call) -> bool:
    """Whether a call lost an argument that it may do without: the last one, or one given by keyword."""
    if len(replacement.args) == len(call.args):
        return False
    pairs = zip(call.args, replacement.args, strict=False)
    at = next((at for at, (old, new) in enumerate(pairs) if old is not new), len(replacement.args))
    if _says_strict(call.args[at]):
        return False
    return at == len(replacement.args) or call.args[at].keyword is not None


def _says_strict(node: cst.CSTNode) -> bool:
    """Whether this is the `strict=` of a `zip`: an assertion, whose loss changes nothing where it holds."""
    return isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict"
