"""The audit finds what was copied, renamed or not, and nothing else; and `cleanroom/` passes it."""

import pytest

from harness import audit as module
from harness.__main__ import main
from harness.audit import SHORTEST, common_runs, stream

THEIRS = '''
def overlap_of(first, second, eps=1e-7):
    """Somebody's docstring."""
    left = torch.maximum(first[..., 0], second[..., 0])  # somebody's comment
    right = torch.minimum(first[..., 2], second[..., 2])
    if left.shape[0] > 3:
        return (right - left).clamp(min=0) / (first.sum(-1) + eps)
    return None
'''
RENAMED = """
X = 1

def shared(a, b, tiny=1e-7):
    lo = torch.maximum(
        a[..., 0],
        b[..., 0],
    )
    hi = torch.minimum(a[..., 2], b[..., 2])

    if lo.shape[0] > 3:
        return (hi - lo).clamp(min=0) / (a.sum(-1) + tiny)
    return None
"""
OTHER = """
def shared(a, b, tiny=1e-7):
    lo, hi = a.unbind(-1)
    return (hi - lo).relu() / b.sum(-1).add(tiny)
"""


def runs(ours, theirs=THEIRS):
    return list(common_runs([stream("ours.py", ours)], "upstream==1", [stream("theirs.py", theirs)]))


def test_a_copy_with_other_names_and_layout_is_one_run():
    [found] = runs(RENAMED.replace("a[..., 0],\n        b[..., 0],\n    )", "a[..., 0], b[..., 0])"))
    assert (found.first, found.last, found.line) == (4, 11, 2)
    assert found.tokens >= 80


def test_a_trailing_comma_breaks_a_run_and_both_parts_are_found():
    assert [run.first for run in runs(RENAMED)] == [4, 8]


def test_what_is_written_otherwise_is_not_found():
    assert runs(OTHER) == []


def test_other_calls_numbers_and_attributes_are_other_tokens():
    for old, new in (("clamp", "relu"), ("1e-7", "1e-6"), ("maximum", "minimum"), ("sum", "mean")):
        changed = RENAMED.replace(old, new)
        assert sum(run.tokens for run in runs(changed)) < sum(run.tokens for run in runs(RENAMED))


def test_a_list_of_names_counts_once():
    names = ", ".join(f"name_{index}" for index in range(60))
    assert runs(f"from ours import ({names})\n", f"from theirs import ({names})\n") == []
    parameters = ", ".join(f"name_{index}: Tensor" for index in range(60))
    assert runs(f"def ours({parameters}): ...\n", f"def theirs({parameters}): ...\n") == []


def test_what_is_listed_is_ours_and_its_length_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "our_streams", lambda: [stream("cleanroom/ours.py", RENAMED)])
    monkeypatch.setattr(module, "upstream_streams", lambda *_: [stream("theirs.py", THEIRS)])
    limits = tmp_path / "audit.toml"
    monkeypatch.setattr(module, "ALLOWED", limits)
    limits.write_text("longest = 30\n")
    text, clean = module.audit(["yolox==0.3.0"])
    assert not clean
    assert "too long: " in text
    assert "somebody" not in text.lower()
    allowed = '[[allowed]]\nfile = "cleanroom/ours.py"\ntokens = 200\nreason = "a test"\n'
    limits.write_text("longest = 30\n" + allowed)
    text, clean = module.audit(["yolox==0.3.0"])
    assert clean
    assert "allowed: a test" in text


@pytest.mark.oracle
def test_the_project_is_clean(capsys):
    assert main(["audit", "--shown", "3"]) == 0
    assert f"runs of at least {SHORTEST} tokens" in capsys.readouterr().out
    assert len(module.our_streams()) > 50
