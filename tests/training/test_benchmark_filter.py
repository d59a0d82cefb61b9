"""What a filter costs end to end: the benchmark's two runs take turns, and its file says what was measured."""

import json

import pytest


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
    assert "tokens: koala-m / sgd" in done.stdout
