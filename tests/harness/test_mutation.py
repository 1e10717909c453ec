"""Mutants of tiny sources, their samples, the list of equivalents, what a child of the gate may do, score and bars."""

import json
import os
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.bars import mutation as bars
from harness.execute import Result
from harness.mutation import equivalents, syntactic
from harness.mutation.command import SETTINGS
from harness.mutation.gate import Gate
from harness.mutation.mutant import Mutant, changed, distinct
from harness.mutation.parity import _fingerprint
from harness.mutation.plan import MutationPlan
from harness.mutation.reach import Reach
from harness.mutation.run import _row, _spread, settled
from harness.mutation.sample import chosen, sampled
from harness.mutation.sources import Sources, module_name, statement
from harness.mutation.zygote import Died, Zygote, ZygoteFailed, stage
from harness.plan import RequestError
from reports.mutation import score, tables

SOURCE = textwrap.dedent(
    '''\
    """A module."""

    SCALE = 2.0


    def half(value: float = 1.0, text: str = "of 3") -> float:
        """Half of `value`."""
        if value < 0:
            raise ValueError(f"value must not be below {0 + 1}")
        pairs = list(zip([value], [SCALE], strict=True))
        return round(value / SCALE, ndigits=3) if pairs else None
    '''
)


def mutant(number=0, kind="syntactic", file="cleanroom/a.py", operator="swap_op", after="b"):
    return Mutant(kind, operator, file, number + 1, f"a{number}", after, f"source {number}")


def test_syntactic_mutants_change_computation_and_leave_texts_alone():
    found = list(syntactic.mutants("cleanroom/half.py", SOURCE))
    changes = {(own.line, own.after) for own in found}
    assert (3, "SCALE = 3.0") in changes
    assert (8, "if value <= 0:") in changes
    assert (11, "return round(value * SCALE, ndigits=3) if pairs else None") in changes
    assert (11, "return round(value / SCALE, ) if pairs else None") in changes
    assert (6, 'def half(value: float = 2.0, text: str = "of 3") -> float:') in changes
    assert all(own.line not in {1, 7, 9} for own in found)
    assert not any("strict=False" in own.after or '"XX' in own.after for own in found)
    assert len({own.id for own in found}) == len(found)
    assert all(compile(own.source, "mutant", "exec") and own.source != SOURCE for own in found)


def test_a_mutant_that_means_the_same_or_does_not_compile_is_none():
    texts = ["x = (1)\ny = 2\n", "x = 1 +\ny = 2\n", "x = 3\ny = 2\n", "x = 3 # again\ny = 2\n", "x = 1\ny = 3\n"]
    given = [Mutant("semantic", "o", "f.py", *changed("x = 1\ny = 2\n", text), text) for text in texts]
    assert [own.after for own in distinct(given, "x = 1\ny = 2\n")] == ["x = 3", "y = 3"]


def test_what_changed_is_said_on_one_line():
    assert changed("a\nb\nc\n", "a\nd\nc\n") == (2, "b", "d")
    assert changed("f(\n    a,\n    b,\n)\n", "f(\n    a,\n)\n") == (3, "a, b,", "a,")
    own = mutant()
    assert "+source 0" in own.diff("original")


def test_the_id_follows_the_text_of_the_file():
    one, other = (Mutant("syntactic", "o", "f.py", 1, "a", "b", text) for text in ("b\nc", "b\nd"))
    assert one.id != other.id


def test_a_sample_is_drawn_by_kind_and_stays_where_the_text_does():
    mutants = [mutant(n, file=f"cleanroom/{n % 4}.py", operator=f"o{n % 2}") for n in range(400)]
    mutants += [mutant(n, kind="semantic", operator="axis") for n in range(10)]
    taken = sampled(mutants, 40, seed=3)
    assert taken == sampled(list(reversed(mutants)), 40, seed=3) != sampled(mutants, 40, seed=4)
    assert len({own.id for own in taken}) == 40
    assert [own.kind for own in taken[:10]] == ["semantic"] * 10  # first, and no more than there are
    assert {own.file for own in taken[10:]} == {f"cleanroom/{n}.py" for n in range(4)}
    # One mutant less is one change at most, whatever the ids, which follow the text of the whole file.
    fewer = sampled([replace(own, source="x = 0") for own in mutants if own is not taken[-1]], 40, seed=3)
    same = {(own.file, own.line) for own in fewer} & {(own.file, own.line) for own in taken}
    assert len(same) == 39
    assert len(sampled(mutants, 0, 0)) == len(sampled(mutants, 999, 0)) == 410
    assert len(sampled(mutants, 8, 0)) == 8
    assert {own.kind for own in sampled(mutants, 8, 0)} == {"semantic", "syntactic"}


def test_workers_begin_at_different_files():
    mutants = [mutant(n) for n in range(5)]
    assert _spread(mutants, 2) == [mutants[n] for n in (0, 3, 1, 4, 2)]
    assert _spread(mutants, 1) == mutants
    assert _spread([], 2) == []


def test_mutants_are_chosen_by_file_kind_and_id():
    mutants = [mutant(0), mutant(1, kind="semantic"), mutant(2, file="cleanroom/b.py")]
    assert chosen(mutants, files="*/b.py") == [mutants[2]]
    assert chosen(mutants, kinds=("semantic",)) == [mutants[1]]
    assert chosen(mutants, ids=(mutants[0].id,)) == [mutants[0]]


def test_a_plan_survives_its_folder_and_refuses_what_is_none():
    plan = MutationPlan(("yolox==0.3.0",), sample=5)
    assert MutationPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    with pytest.raises(RequestError, match=f"run.json: {SETTINGS}"):
        MutationPlan.from_json({"orcales": []})


def test_equivalents_are_known_by_text_and_refused_without_a_reason(tmp_path):
    file = tmp_path / "equivalent.toml"
    entry = '[[equivalent]]\nfile = "cleanroom/a.py"\nbefore = "a0"\nafter = "b"\nreason = "{}"\n'
    file.write_text(entry.format("the same"))
    found = equivalents.equivalents(file)
    assert equivalents.entry_of(mutant(0), found).reason == "the same"
    assert equivalents.entry_of(mutant(1), found) is None
    assert equivalents.entry_of(mutant(0, file="cleanroom/b.py"), found) is None
    assert equivalents.unmatched(found, [mutant(0)], {"cleanroom/a.py"}) == []
    assert equivalents.unmatched(found, [mutant(1)], {"cleanroom/a.py"}) == list(found)
    assert equivalents.unmatched(found, [], {"cleanroom/b.py"}) == []
    for text, said in (
        (entry.format(" "), "entry 1: no reason"),
        ("[[equivalent]]\nfiel = 1\n", "entry 1"),
        ("=", "equivalent.toml"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=said):
            equivalents.equivalents(file)


def test_a_listed_mutant_that_is_found_is_stale_unless_the_line_stands_for_all_of_its_mutants():
    found = {"killed": {"verdict": "killed", "by": "test", "detail": "t", "seconds": 1.0}}
    found["survived"] = {**found["killed"], "verdict": "survived", "by": ""}
    one, line = (equivalents.Equivalent("cleanroom/a.py", "a0", after, "why") for after in ("b", "*"))
    assert equivalents.entry_of(mutant(0, after="other"), [one, line]) is line
    verdicts = {
        (how, entry.after): _row(mutant(0), found[how], entry, 9)["verdict"] for how in found for entry in (one, line)
    }
    assert verdicts == {
        ("killed", "b"): "stale",
        ("killed", "*"): "killed",
        ("survived", "b"): "equivalent",
        ("survived", "*"): "equivalent",
    }


def test_the_projects_list_of_equivalents_fits_its_files():
    sources = Sources()
    listed = equivalents.equivalents()
    for entry in listed:
        whole = " ".join(sources.texts[entry.file].split())
        assert entry.before in whole, f"stale: {entry.text}"
        assert entry.before != entry.after


@pytest.mark.parametrize(
    ("line", "lines"),
    [(3, set()), (6, set(range(6, 12))), (8, {8}), (9, {9}), (11, {11})],
    ids=["module", "head of a function", "head of an if", "inside an if", "simple"],
)
def test_the_statement_of_a_line(line, lines):
    assert statement(SOURCE, line) == lines


def test_a_statement_over_several_lines_and_a_decorated_method():
    text = "class A:\n    size = 1\n\n    @property\n    def f(self):\n        return g(\n            1,\n        )\n"
    assert statement(text, 7) == {6, 7, 8}
    assert statement(text, 4) == set(range(4, 9))
    assert statement(text, 2) == set()


def test_what_imports_a_file_is_known_however_far():
    sources = Sources()
    own = sources.closure("harness/operations/tal.py")
    assert {"cleanroom/assign/tal.py", "cleanroom/assign/_tal_sparse.py", "cleanroom/overlap.py"} <= own
    assert "cleanroom/assign/simota.py" not in own
    tests = ["tests/cleanroom/test_tal.py", "tests/cleanroom/test_dfl.py"]
    assert sources.importers("cleanroom/assign/_tal_sparse.py", tests) == tests[:1]
    assert module_name("cleanroom/assign/__init__.py") == "cleanroom.assign"


def test_lines_are_recorded_of_one_folder_only(tmp_path, monkeypatch):
    (tmp_path / "recorded_subject.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import recorded_subject

    reach = Reach(tmp_path)
    with reach.recording():
        recorded_subject.half(2.0)
    assert reach.take() == {"recorded_subject.py": [6, 8, 10, 11]}
    assert reach.take() == {}
    recorded_subject.half(2.0)
    assert reach.take() == {}


def begin(*arguments):
    """The preparation of the zygote below: nothing."""


def answer(connection, value):
    stage(connection, "answering", 5.0)
    return value + 1


def misbehave(connection, how):
    stage(connection, how, 0.3)
    if how == "spins":
        while True:
            pass
    if how == "sleeps":
        time.sleep(60)
    if how == "exits":
        os._exit(3)
    if how == "allocates":
        return len(bytearray(1 << 40))
    raise ValueError(how)


def write_and_sleep(connection, file):
    part = Path(f"{file}.part")
    part.write_text(str(os.getpid()))
    part.replace(file)
    time.sleep(60)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zygote")
    held = Zygote("tests.harness.test_mutation:begin", folder=folder, name="tests")
    yield held
    held.close()


def test_one_element_of_any_stride_has_a_fingerprint():
    strided = torch.zeros(1, 3, dtype=torch.float16).T[:1, 0]
    strided = strided.as_strided((1,), (3,))
    assert _fingerprint(Result({"value": strided})) == _fingerprint(Result({"value": strided.clone()}))


def test_a_zygote_answers_and_says_how_a_child_ended(zygote):
    me = "tests.harness.test_mutation"
    assert zygote.ask(f"{me}:answer", 60, value=1) == 2
    for how, by, said in (
        ("spins", "timeout", "spins: more processor time"),
        ("sleeps", "timeout", "sleeps: no answer in 1 s"),
        ("exits", "crash", "exits: exited with code 3"),
    ):
        with pytest.raises(Died, match=said) as died:
            zygote.ask(f"{me}:misbehave", 1 if how == "sleeps" else 60, how=how)
        assert died.value.by == by
    for how, said in (("allocates", "MemoryError"), ("raises", "ValueError: raises")):
        with pytest.raises(ZygoteFailed, match=said):
            zygote.ask(f"{me}:misbehave", 60, how=how)
    assert zygote.ask(f"{me}:answer", 60, value=2) == 3


def test_a_zygote_that_is_closed_lets_go_of_who_asks(tmp_path):
    held = Zygote("tests.harness.test_mutation:begin", folder=tmp_path, name="closed")
    assert held.ask("tests.harness.test_mutation:answer", 60, value=1) == 2
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(held.ask, "tests.harness.test_mutation:write_and_sleep", 600, file=str(tmp_path / "child"))
        while not (tmp_path / "child").exists():
            time.sleep(0.01)
        held.close()
        with pytest.raises(ZygoteFailed, match="is gone"):
            asked.result(timeout=30)
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


def frame(*verdicts, kind="syntactic", population=None):
    rows = [
        {"id": f"{kind}{n}", "kind": kind, "operator": "swap_op", "file": "cleanroom/a.py", "line": n, "before": "a",
         "after": "<b>", "verdict": verdict, "by": "parity" if verdict == "killed" else "", "detail": "why",
         "seconds": 0.5, "population": population or len(verdicts)}
        for n, verdict in enumerate(verdicts)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def fallen(*frames):
    return [bar.bar for bar in bars.bars(pd.concat(frames)) if not bar.ok]


def test_bars_hold_from_95_percent_and_for_every_semantic_mutant():
    assert fallen(frame(*["killed"] * 95, *["survived"] * 5)) == []
    assert fallen(frame(*["killed"] * 94, *["survived"] * 6)) == ["mutants found"]
    one = frame("survived", *["killed"] * 99, kind="semantic")
    assert fallen(one) == ["semantic mutants found"]
    assert fallen(frame("killed", "equivalent", kind="semantic")) == []
    assert fallen(frame("killed", "stale")) == ["stale equivalents"]


def test_a_sampled_score_says_so_with_wilsons_interval():
    own = score(frame(*["killed"] * 18, "survived", "survived", "equivalent", population=400))
    assert (own.judged, own.tried, own.population, own.share) == (20, 21, 400, 0.9)
    assert (own.low, own.high) == pytest.approx((0.6990, 0.9721), abs=1e-4)
    said = bars.sentence(frame(*["killed"] * 18, "survived", "survived", population=400))
    assert "69.9% to 97.2%" in said
    assert "a sample of 20 of 400" in said
    assert "sample" not in bars.sentence(frame("killed"))


def test_each_kind_of_a_sample_counts_as_much_as_there_are_of_it():
    semantic = frame(*["killed"] * 10, kind="semantic", population=100)
    both = pd.concat([semantic, frame(*["killed"] * 8, *["survived"] * 2, population=900)])
    own = score(both)
    assert (own.judged, own.population) == (20, 1000)
    assert own.share == pytest.approx(0.82)
    assert own.low < 0.82 < own.high < 0.97
    assert "is estimated at 82.0%" in bars.sentence(both)


def test_a_sample_falls_where_its_whole_interval_lies_below_the_bar():
    assert fallen(frame(*["killed"] * 54, *["survived"] * 6, population=900)) == []  # 90%, up to 95.3%
    assert fallen(frame(*["killed"] * 50, *["survived"] * 10, population=900)) == ["mutants found"]
    # One semantic mutant is one too many, sampled or not.
    assert fallen(frame(*["killed"] * 99, "survived", kind="semantic", population=900)) == ["semantic mutants found"]


def test_the_report_lists_survivors_and_equivalents_with_their_lines():
    found = {table.name: table for table in tables(frame("killed", "survived", "equivalent"))}
    assert list(found) == ["mutants", "mutants-survived", "mutants-files", "mutants-operators", "mutants-equivalent"]
    [row] = found["mutants-survived"].rows
    assert (row["place"].text, row["after"].text) == ("cleanroom/a.py:1", "<b>")
    [row] = found["mutants"].rows
    assert (row["killed"].value, row["parity"].value, row["share"].value) == (1, 1, 0.5)


def test_what_is_judged_once_more():
    verdicts = (
        ("a", "killed"),
        ("b", "survived"),
        ("c", "killed"),
        ("c", "retracted"),
        ("d", "retracted"),
        ("d", "killed"),
    )
    rows = [{"id": key, "verdict": verdict} for key, verdict in verdicts]
    assert settled(rows, again=False) == {"a", "b", "d"}
    assert settled(rows, again=True) == {"a", "d"}


def test_a_test_that_fails_anyway_or_after_others_finds_no_mutant():
    class Stub(Gate):
        def __init__(self):
            self._sound, self._subject = {}, "subject"

        def _suite(self, task, **request):
            if task == "holds":
                return request["test"] != "fails alone"
            names = [row["test"] for row in request["rows"]]
            if names == ["fails after others"]:
                return None
            return {"by": "test", "detail": f"{names[0]}: assert", "test": names[0]}

    rows = [{"test": name} for name in ("fails after others", "fails alone", "fails on the mutant")]
    assert Stub()._by_tests(rows, {})["test"] == "fails on the mutant"
    assert Stub()._by_tests(rows[1:2], {}) is None
