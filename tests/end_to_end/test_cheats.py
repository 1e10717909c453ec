"""Candidates that cheat are caught, each by what it does; an honest one beside them is not."""

import pytest

CHEATS = {
    "seeds_everything": "the global random state of PyTorch was changed",
    "seeds_numpy": "the global random state of NumPy was changed",
    "seeds_python": "the global random state of Python was changed",
    "writes_later": "thread the-late-one was left running",
    "reuses_its_output": "lies in the memory of the last call's iou",
    "gives_two_buffers_in_turn": "lies in the memory of a former call's iou",
    "answers_behind_its_input": "shares memory with input bboxes_b",
    "changes_its_input_in_the_backward_pass": "input bboxes_b was changed",
    "changes_its_input_later": "input bboxes_a was still written after the call had returned",
    "takes_the_oracles_answer": "Bound.__call__ was replaced",
    "calls_the_oracle": "upstream's bboxes_iou was called",
    "turns_the_look_away": "the look at upstream's code was turned away",
    "stops_the_clock": "time.perf_counter_ns was replaced",
    "stops_the_judge": "harness.watch.same was replaced; harness.numeric.compare was replaced",
}
TIMED = {
    "knows_the_workload": "other values of the workload's shapes: mismatch",
    "remembers_when_timed": "from what the call gives",
    "knows_the_timer": "from what the call gives",
    "stops_the_clock_when_timed": "time.perf_counter_ns was replaced",
}
RUN = ("--ops", "bboxes_iou", "--workers", "1", "--shrink-seconds", "0", "--dtypes", "float32", "--no-relations")


def plug(*names):
    return [option for name in names for option in ("--candidate", f"{name}=tests.cheats:{name}")]


@pytest.fixture(scope="session")
def judged(harness_run):
    """One run with all of them beside an honest one."""
    return harness_run(*RUN, "--examples", "30", "--no-bench", *plug("honest", *CHEATS))


@pytest.mark.oracle
def test_the_honest_one_holds(judged):
    assert judged.failures("honest") == []
    assert judged.operation("honest")["match"] > 0


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(judged, name):
    assert judged.code == 1
    told = [f"{row['verdict']} {row['detail']}" for row in judged.failures(name)]
    assert any(CHEATS[name] in line for line in told), told


@pytest.fixture(scope="session")
def honesty(harness_run):
    """(name, bar) of every bar on the honesty of a timed call, or on one whose times cannot be used."""
    # No speed is judged: a few pairs are enough for every look at what a timed call gives.
    short = ("--examples", "0", "--no-parity", "--workloads", "coco-b1", "--row-seconds", "0.2")
    run = harness_run(*RUN, *short, *plug("honest", *TIMED))
    assert run.code == 1
    bars = [bar for bar in run.summary["gate"] if bar["bar"].startswith(("honesty", "measurement"))]
    return [(name, bar) for name in ("honest", *TIMED) for bar in bars if f", {name} against" in bar["bar"]]


@pytest.mark.oracle
def test_the_honest_one_is_timed(honesty):
    own = [bar for name, bar in honesty if name == "honest"]
    assert len(own) == 2  # forward, forward and backward
    assert all(bar["ok"] for bar in own), own


@pytest.mark.oracle
@pytest.mark.parametrize("name", TIMED)
def test_a_cheat_on_the_timer_is_caught(honesty, name):
    own = [bar for other, bar in honesty if other == name]
    assert [TIMED[name] in bar["reason"] and not bar["ok"] for bar in own] == [True, True], own
