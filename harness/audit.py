"""`harness audit`: how much of `cleanroom/` could have been copied from upstream, by runs of equal tokens.

Both sides become streams of tokens without comments, docstrings and layout; names that an author chooses (variables,
parameters, functions, classes) count as one, so that renaming hides nothing, while attributes, called functions,
keywords, operators and numbers stay. The longest runs common to both are listed with our text alone: nobody who reads
the list sees upstream's.
"""

from __future__ import annotations

import io
import keyword
import tokenize
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).parent.parent
ALLOWED = Path(__file__).with_name("audit.toml")
SHORTEST = 16
"""Tokens of the shortest run that is looked for: below, every two programs agree."""
LISTED = (("name", ","), ("name", ":", "name", ","))
SKIPPED = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
)


@dataclass(frozen=True)
class Stream:
    """Normalised tokens of one file, and the line of each."""

    file: str
    tokens: tuple[str, ...]
    lines: tuple[int, ...]


@dataclass(frozen=True)
class Common:
    """A maximal run of tokens common to a file of ours and one of upstream."""

    tokens: int
    ours: str
    first: int
    last: int
    oracle: str
    theirs: str
    line: int

    def __str__(self) -> str:
        return f"{self.tokens:>4} tokens  {self.ours}:{self.first}-{self.last}  {self.oracle} {self.theirs}:{self.line}"


def stream(file: str, source: str) -> Stream:
    """The normalised tokens of a source text; raises what `tokenize` raises where it is no Python."""
    found = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in SKIPPED]
    tokens, lines, docstring = [], [], False
    for index, token in enumerate(found):
        if docstring:  # its end of line
            docstring = False
            continue
        before, after = (found[index + step].string if 0 <= index + step < len(found) else "" for step in (-1, 1))
        alone = index == 0 or found[index - 1].type == tokenize.NEWLINE or before == ":"
        if token.type == tokenize.STRING and alone and found[min(index + 1, len(found) - 1)].type == tokenize.NEWLINE:
            docstring = True
            continue
        tokens.append(_normal(token, before, after))
        lines.append(token.start[0])
    return Stream(file, *_listed_once(tokens, lines))


def _listed_once(tokens: Sequence[str], lines: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A list of names, or of parameters with types, says how long it is and no more: one of them stands for all."""
    kept: list[int] = []
    index = 0
    while index < len(tokens):
        for unit in LISTED:
            here, before = tokens[index : index + len(unit)], [tokens[i] for i in kept[-len(unit) :]]
            if tuple(here) == unit == tuple(before):
                index += len(unit)
                break
        else:
            kept.append(index)
            index += 1
    return tuple(tokens[i] for i in kept), tuple(lines[i] for i in kept)


def _normal(token: tokenize.TokenInfo, before: str, after: str) -> str:
    if token.type == tokenize.NEWLINE:
        return ";"
    if token.type == tokenize.STRING:
        return "'"
    called = after == "(" and before not in {"def", "class"}
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string) and before != "." and not called:
        return "name"
    return token.string


def common_runs(ours: Iterable[Stream], oracle: str, theirs: Sequence[Stream]) -> Iterator[Common]:
    """Maximal common runs of at least `SHORTEST` tokens, the longest of each place of ours."""
    ids: dict[str, int] = {}
    known = [(some, *_numbered(some, ids)) for some in theirs]
    hashes = np.concatenate([np.empty(0, np.uint64), *(windows for *_, windows in known)])
    owner = np.concatenate([np.empty(0, int), *(np.full(len(w), i) for i, (*_, w) in enumerate(known))]).astype(int)
    place = np.concatenate([np.empty(0, int), *(np.arange(len(windows)) for *_, windows in known)]).astype(int)
    order = np.argsort(hashes, kind="stable")
    hashes, owner, place = hashes[order], owner[order], place[order]
    for own in ours:
        numbers, windows = _numbered(own, ids)
        low, high = np.searchsorted(hashes, windows, "left"), np.searchsorted(hashes, windows, "right")
        covered = 0
        for at in np.flatnonzero(high > low):
            if at < covered:
                continue
            best, where = 0, 0
            for hit in range(low[at], high[at]):
                length = _agree(numbers[at:], known[owner[hit]][1][place[hit] :])
                if length > best:
                    best, where = length, hit
            if best >= SHORTEST:
                covered = at + best
                other = known[owner[where]][0]
                yield Common(
                    best, own.file, own.lines[at], own.lines[at + best - 1], oracle, other.file,
                    other.lines[place[where]],
                )  # fmt: skip


def _numbered(some: Stream, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens as numbers, and a hash of each window of `SHORTEST` of them."""
    numbers = np.array([ids.setdefault(token, len(ids) + 1) for token in some.tokens], dtype=np.uint64)
    windows = np.zeros(max(0, len(numbers) - SHORTEST + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for step in range(SHORTEST):
            windows = windows * np.uint64(0x100000001B3) + numbers[step : step + len(windows)]
    return numbers, windows


def _agree(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def our_streams() -> list[Stream]:
    """The files of `cleanroom/`."""
    files = sorted((PROJECT / "cleanroom").rglob("*.py"))
    return [stream(str(file.relative_to(PROJECT)), file.read_text(encoding="utf-8")) for file in files]


def upstream_streams(root: Path, folders: Iterable[str]) -> list[Stream]:
    """The files beneath some folders of an unpacked release; what Python no longer reads is left out."""
    found = []
    for file in sorted({file for folder in folders for file in root.glob(f"{folder}/**/*.py")}):
        try:
            found.append(stream(str(file.relative_to(root)), file.read_text(encoding="utf-8", errors="replace")))
        except (tokenize.TokenError, SyntaxError, IndentationError):
            continue
    return found


def audit(pins: Iterable[str], shown: int = 20) -> tuple[str, bool]:
    """The longest runs of every pin as text, and whether all of them may stand."""
    from harness import oracles
    from reference.packages import AUDITED

    table = tomllib.loads(ALLOWED.read_text())
    longest, reasons = table["longest"], {entry["file"]: entry for entry in table.get("allowed", [])}
    ours, runs = our_streams(), []
    for pin in pins:
        theirs = upstream_streams(oracles.locate(pin).root, AUDITED[oracles.package(pin)])
        runs += common_runs(ours, pin, theirs)
    runs.sort(key=lambda run: -run.tokens)
    wrong = [run for run in runs if run.tokens > max(longest, reasons.get(run.ours, {"tokens": 0})["tokens"])]
    lines = [f"{len(ours)} files of cleanroom/, runs of at least {SHORTEST} tokens; longest that may stand: {longest}"]
    for run in runs[:shown]:
        reason = reasons.get(run.ours, {}).get("reason") if run.tokens > longest else None
        lines.append(f"{run}{f'  allowed: {reason}' if reason else ''}")
    lines += [f"too long: {run}" for run in wrong]
    return "\n".join(lines) + "\n", not wrong
