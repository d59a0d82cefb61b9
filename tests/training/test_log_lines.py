"""What a run says of itself between evaluations, what its record says of where it ran, how it ends when it diverges."""

import os
import re
from types import SimpleNamespace

import pytest
import torch

from koala import records
from koala.terminal import Stream
from koala.training.progress import Progress
from koala.training.ranks import Ranks, device_index
from tests.refused import refused


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "NOTHING"])
def test_without_a_terminal_a_line_every_log_every_steps(runs, capfd, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    runs.launch("optim=koala-m", "log_every=5", "epochs=1")
    printed = capfd.readouterr().err
    assert "\x1b" not in printed
    lines = [line for line in printed.splitlines() if " step " in line]
    assert [re.search(r"step (\d+)/19", line)[1] for line in lines] == ["5", "10", "15"]
    reported = r"loss [\d.]+  lr 1  R [\d.e+-]+  gain [\d.e+-]+  [\d,]+ images/s  \d+:\d\d:\d\d left"
    for line in lines:
        assert re.search(reported, line), line


def test_record_says_which_segment_ran_where_and_times_no_first_step(runs):
    runs.break_off(23, "checkpoint_every=0", "log_every=3")
    record = runs.launch("log_every=3")
    first, second = record["segments"]
    assert (first["from"], first["to"], second["from"], second["to"]) == (0, 23, 23, 38)
    assert records.read_record(runs.folder())["segments"] == record["segments"]
    for segment in (first, second):
        assert segment["ranks"] == 1 and segment["backend"] and segment["step_ms"] > 0 and len(segment["load"]) == 2
        assert all(segment["seconds"][phase] > 0 for phase in ("start", "train", "eval", "save"))
    assert record["seconds"]["train"] == pytest.approx(sum(s["seconds"]["train"] for s in (first, second)))


def test_time_left_is_by_the_pace_of_this_segment():
    task = SimpleNamespace(task=SimpleNamespace(counts=()))
    progress = Progress(Ranks(0, 1, torch.device("cpu")), task, {})
    progress.first_step, progress.position.step = 990, 1000
    progress.clock.seconds["train"] = 1000.0
    assert progress.seconds_left(1010) == pytest.approx(1000.0, rel=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=sgd", "optim.lr=1e30", "max_steps=1"],
        ["optim=sgd", "optim.lr=1e20", "optim.weight_decay=1e30", "max_steps=1"],
    ],
    ids=["after one step", "weights only"],
)
def test_what_is_not_finite_has_diverged_whatever_the_training_loss_says(runs, overrides):
    record = runs.launch(*overrides)
    assert record["status"] == "diverged" and record["error"]


def test_a_stream_whose_reader_has_gone_takes_everything_else_with_it():
    reader, writer = os.pipe()
    stream = Stream(os.fdopen(writer, "w", buffering=1))
    os.close(reader)
    assert stream.write("nobody hears this\n") == 18
    stream.flush()
    os.write(writer, b"nor a library in C that writes to the same descriptor")
    assert not stream.isatty()


@pytest.mark.parametrize("local, visible, index", [(0, 4, 0), (3, 4, 3), (3, 1, 0)])
def test_a_rank_s_gpu_is_its_own_or_the_only_one_it_was_given(local, visible, index):
    assert device_index(local, visible) == index


def test_a_rank_without_a_gpu_is_reported():
    with refused("num_gpus", 2, mentions="rank 3"):
        device_index(3, 2)
