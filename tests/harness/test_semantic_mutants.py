import ast
from pathlib import Path

import pytest

from harness.mutation.semantic import OPERATORS, mutants
from harness.mutation.semantic.patches import Patch, patches
from harness.mutation.semantic.source import Source

PROJECT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "cleanroom").rglob("*.py"))
NO_COMPUTATION = {
    "cleanroom/__init__.py": "a docstring",
    "cleanroom/assign/__init__.py": "a docstring",
    "cleanroom/boxes.py": "names of other modules",
    "cleanroom/kernels/__init__.py": "a docstring",
    "cleanroom/losses/__init__.py": "a docstring",
    "cleanroom/losses/_blocks.py": "shares work out: no result depends on it",
    "cleanroom/losses/_rtdetr_checks.py": "refuses arguments",
    "cleanroom/paths.py": "chooses among paths that agree",
}
SAMPLES = {
    "constant": ("EPS = 1e-7\n", "EPS = 0.0001\n"),
    "clamp": ("def f(x):\n    return x.clamp(min=0)\n", "def f(x):\n    return x\n"),
    "clamp-bound": ("def f(x, n):\n    return x.clamp(0, n)\n", "def f(x, n):\n    return x.clamp(0, (n) - 1)\n"),
    "count": ("def f(x, k):\n    return x.topk(k)\n", "def f(x, k):\n    return x.topk(k - 1)\n"),
    "factor": ("def f(x, stride):\n    return x * stride\n", "def f(x, stride):\n    return x\n"),
    "normaliser": ("def f(x, union):\n    return x / union\n", "def f(x, union):\n    return x\n"),
    "dtype": ("def f(x):\n    return x.double()\n", "def f(x):\n    return x.float()\n"),
    "boundary": ("def f(x, y):\n    return x < y\n", "def f(x, y):\n    return x <= y\n"),
    "direction": ("def f(x, y):\n    return x < y\n", "def f(x, y):\n    return x > y\n"),
    "extremum": ("def f(x):\n    return x.amax(1)\n", "def f(x):\n    return x.amin(1)\n"),
    "tie": ("def f(x):\n    return x.sort(stable=True)\n", "def f(x):\n    return x.sort(stable=False)\n"),
    "padding": ("def f(x, m):\n    return torch.where(m, x, 0)\n", "def f(x, m):\n    return x\n"),
    "stale": ("def f(n):\n    return torch.zeros(n)\n", "def f(n):\n    return torch.ones(n)\n"),
    "gradient": ("def f(x):\n    return x.detach()\n", "def f(x):\n    return x\n"),
    "axis": ("def f(x):\n    return x.sum(-1)\n", "def f(x):\n    return x.sum(-2)\n"),
    "broadcast": ("def f(x):\n    return x[:, None]\n", "def f(x):\n    return x[None]\n"),
}
UNTOUCHED = '''
"""A minimum of 0.5 < 1."""
from torch import zeros

BLOCK = 1 << 15


def _check_ratio(ratio: float) -> None:
    if ratio > 0.5:
        raise ValueError(f"ratio must be at most {0.5 * ratio}, got {ratio}")


def f(x: "Tensor | None" = None) -> "zeros(0.5)":
    """The `x.sum(-1) < 0.5` of it."""
    if x.ndim < 1:
        raise ValueError("x < 1")
    for part in x.split(max(1, BLOCK // len(x))):
        _check_ratio(part)
    torch._assert_async(x < 0.5, "x < 0.5")
'''


@pytest.fixture(scope="module")
def found():
    return {file: list(mutants(file, (PROJECT / file).read_text())) for file in FILES}


def test_every_patch_applies_exactly_once():
    stale = []
    for patch in patches():
        try:
            patch.apply((PROJECT / patch.file).read_text())
        except (OSError, ValueError) as error:
            stale.append(str(error))
    assert not stale


@pytest.mark.parametrize("text", ["x = 1\n", "x = 2\nx = 2\n"])
def test_a_patch_that_does_not_apply_once_is_an_error(text):
    with pytest.raises(ValueError, match="instead of once"):
        Patch("tie", "a.py", "x = 2\n", "", "none").apply(text)


def test_every_patch_is_among_the_mutants(found):
    # Where an operator makes the same text, the patch comes first and stays.
    for patch in patches():
        mutated = patch.apply((PROJECT / patch.file).read_text())
        assert any(mutant.source == mutated and mutant.operator == patch.operator for mutant in found[patch.file])


def test_every_file_that_computes_has_mutants(found):
    without = {file for file in FILES if not found[file] and file not in NO_COMPUTATION}
    assert not without
    assert not {file for file in NO_COMPUTATION if file not in FILES or found[file]}


def test_mutants_compile_and_differ_outside_of_texts(found):
    for file, own in found.items():
        original = _without_texts((PROJECT / file).read_text())
        for mutant in own:
            assert _without_texts(mutant.source) != original, mutant
            assert mutant.kind == "semantic"
            assert mutant.file == file


def test_ids_are_those_of_one_mutant_each_and_stay(found):
    ids = [mutant.id for own in found.values() for mutant in own]
    assert len(ids) == len(set(ids))
    again = [mutant.id for mutant in mutants(FILES[-1], (PROJECT / FILES[-1]).read_text())]
    assert again == [mutant.id for mutant in found[FILES[-1]]]


def test_there_are_enough_and_no_flood(found):
    assert 300 <= sum(map(len, found.values())) <= 900


def test_every_operator_has_places_in_cleanroom(found):
    assert {mutant.operator for own in found.values() for mutant in own} >= set(OPERATORS)


def test_every_operator_says_which_fault_it_stands_for():
    assert all("Stands for" in operator.__doc__ for operator in OPERATORS.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_makes_its_fault(name):
    before, after = SAMPLES[name]
    source = Source("sample.py", before)
    assert after in [source.apply(edit) for edit in OPERATORS[name](source)]


def test_texts_annotations_refusals_and_shares_of_work_are_left_alone():
    assert list(mutants("sample.py", UNTOUCHED)) == []


def test_a_mutant_leaves_the_rest_of_the_text_as_it_is():
    source = 'EPS = 1e-7  # of both\n\n\ndef f(x):\n    """Größe."""\n    return (x <\n            0.5)  # kept\n'
    texts = {mutant.source for mutant in mutants("sample.py", source)}
    assert source.replace("<", "<=") in texts
    assert source.replace("1e-7", "0.0001") in texts


def _without_texts(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
        if isinstance(node, ast.Raise):
            node.exc = None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.dump(tree)
