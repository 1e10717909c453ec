"""The sources that are mutated: a private copy of `cleanroom/`, what imports what, which lines are one statement."""

from __future__ import annotations

import ast
import hashlib
import shutil
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SUBJECT = "cleanroom"
ROOMS = (SUBJECT, "cases", "harness/operations", "tests")
"""Folders of which it is known what they import; the rest of the harness imports operations by name, as all do."""


class Sources:
    """The text of every file of `cleanroom/` as it was when this was made; mutants are of this text, whatever happens
    to the working tree meanwhile."""

    def __init__(self, project: Path = PROJECT) -> None:
        self.project = project
        files = sorted((project / SUBJECT).rglob("*.py"))
        self.texts = {file.relative_to(project).as_posix(): file.read_text() for file in files}
        self._imports: dict[str, set[str]] = {}
        for room in ROOMS:
            for file in sorted((project / room).rglob("*.py")):
                name = file.relative_to(project).as_posix()
                self._imports[name] = _imported(self.texts.get(name) or file.read_text())
        self._names = {module_name(name): name for name in self._imports}

    def copy(self, folder: Path) -> None:
        """Write `cleanroom/` into a folder."""
        for name, text in self.texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        for path in (self.project / SUBJECT).rglob("*"):
            # What is no module (a table, a marker) belongs to the package too.
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                target = folder / path.relative_to(self.project)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    @cache  # noqa: B019 - as long-lived as the run
    def closure(self, file: str) -> frozenset[str]:
        """The file and all files of `ROOMS` that it imports, directly or not."""
        found, waiting = set(), [file]
        while waiting:
            name = waiting.pop()
            if name not in found and name in self._imports:
                found.add(name)
                waiting += [self._names[module] for module in self._imports[name] if module in self._names]
        return frozenset(found)

    def importers(self, file: str, among: list[str]) -> list[str]:
        """Those of `among` whose closure holds the file."""
        return [name for name in among if file in self.closure(name)]

    def digest(self, files: frozenset[str], *more: str) -> str:
        """A hash of the text of files, and of more texts."""
        content = hashlib.sha256()
        for name in sorted(files):
            content.update((self.texts.get(name) or (self.project / name).read_text()).encode() + b"\0")
        content.update("\0".join(more).encode())
        return content.hexdigest()[:16]


def module_name(file: str) -> str:
    """ "cleanroom.assign.tal" of "cleanroom/assign/tal.py"."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(text: str) -> set[str]:
    """Every module named in an import statement, wherever it stands, with its packages."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    by_name = {"harness.operations.operation", "harness.operations.NAMES"} & found
    for name in list(found):
        parts = name.split(".")
        found |= {".".join(parts[:end]) for end in range(1, len(parts))}
    if by_name:
        folder = PROJECT / "harness/operations"
        found |= {f"harness.operations.{file.stem}" for file in folder.glob("*.py")}
    return found


def statement(text: str, line: int) -> frozenset[int]:
    """The lines of the innermost statement that a line belongs to; of a compound one, its head.

    Of the head of a function that is the whole function: its defaults act when it is called. Empty for what runs only
    when the module is imported.
    """
    found, inside = None, False
    waiting = [(node, False) for node in ast.parse(text).body]
    while waiting:
        node, within = waiting.pop()
        if not _first(node) <= line <= _last(node):
            continue
        found, inside = node, within
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        waiting = [(child, within or function) for child in _nested(node)]
    if found is None:
        return frozenset()
    if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return frozenset(range(_first(found), _last(found) + 1))
    if not inside:
        return frozenset()
    body = getattr(found, "body", None)
    last = _first(body[0]) - 1 if body else _last(found)
    return frozenset(range(_first(found), max(last, _first(found)) + 1))


def _nested(node: ast.AST) -> list[ast.AST]:
    lists = (getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers", "cases"))
    return [child for children in lists for child in children]


def _first(node: ast.AST) -> int:
    if isinstance(node, ast.match_case):
        return node.pattern.lineno
    return min([node.lineno, *(at.lineno for at in getattr(node, "decorator_list", ()))])


def _last(node: ast.AST) -> int:
    return node.body[-1].end_lineno if isinstance(node, ast.match_case) else node.end_lineno
