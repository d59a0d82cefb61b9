"""The benchmarks of the loop and of a filter run, and their files say what was measured."""

import json

import pytest

from tests.refused import assert_names


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tokens", "images"])
def test_both_arms_are_measured(run_door, tmp_path, task):
    output = tmp_path / "training.json"
    few = ["--steps", "15", "--repeats", "1", "--precision", "fp32", "--width", "4", "--threads", "1"]
    done = run_door("scripts/benchmark_training.py", "--task", task, *few, "--output", str(output), timeout=250)
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())[task]
    plain, ours = measured["runs"]["plain fp32"], measured["runs"]["ours fp32"]
    assert len(plain) == len(ours) == 1
    assert measured["ratio"]["fp32"] == pytest.approx(ours[0] / plain[0])


def test_too_few_steps_for_the_vocabulary_are_refused(run_door):
    done = run_door("scripts/benchmark_training.py", "--task", "tokens", "--steps", "3")
    assert done.returncode == 2
    assert_names(done.stderr.splitlines()[-1], "--steps", 3, 15)


@pytest.mark.slow
def test_two_runs_take_turns(run_door, tmp_path):
    output = tmp_path / "filter.json"
    few = ["--task", "tokens", "--steps", "15", "--repeats", "1", "--threads", "1", "--output", str(output)]
    done = run_door("scripts/benchmark_filter.py", *few, timeout=250)
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())["tokens"]
    assert measured["steps"] == 11  # of 15: three warm up, and after the last nobody asks for another batch
    low, high = measured["quartiles"]
    assert 0 < low <= measured["ratio"] <= high
