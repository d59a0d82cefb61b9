"""A run that is stopped, killed or asked for again ends with the same bits as one left alone."""

import json

import pytest

from koala import records
from koala.runs import launch
from koala.training.loop import Trainer
from tests.refused import refused
from tests.training.conftest import Unplugged, same_bits, without_times

CASES = {
    "koala-m": ["optim=koala-m"],
    "koala-v": ["optim=koala-v"],
    "diagonal-ekf": ["optim=diagonal-ekf", "model.width=8"],
    "lkf": ["optim=lkf", "model.width=8", "optim.r=null"],
    "koala++": ["optim=koala++"],
    "sofim": ["optim=sofim"],
    "adam, dropout of the order": ["optim=adam", "precision=bf16"],
    "sgd, cosine": ["optim=sgd", "schedule=cosine"],
    "lookahead": ["optim=koala-m", "wrapper=lookahead"],
    "swa": ["optim=sgd", "wrapper=swa", "wrapper.start=0.5", "wrapper.every=1"],
    "best validation, plateau": ["optim=adam", "schedule=plateau", "select=best-val"],
    "BatchNorm": ["optim=koala-m", "model=resnet18", "model.width=4", "model.layers=[1,1,1,1]"],
}


@pytest.mark.extended
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_broken_off_at_any_step_and_resumed_is_bit_identical(runs, overrides):
    straight = ["seed=1", "epochs=3", *overrides]
    runs.launch(*straight)
    expected, rows = runs.weights(*straight), without_times(runs.history(*straight))

    broken = [*straight, runs.elsewhere("broken"), "checkpoint_every=0"]
    for step in (7, 23, 38):  # in the first and second epoch, and an epoch's last step
        runs.break_off(step, *broken)
    record = runs.launch(*broken)
    assert record["status"] == "finished"
    assert same_bits(runs.weights(*broken), expected)
    assert without_times(runs.history(*broken)) == rows


def test_a_finished_run_is_not_run_again(runs):
    record = runs.launch()
    assert runs.launch() == record
    again = launch(runs.compose("rerun=true"))
    assert again["started"] >= record["started"] and again["metrics"] == record["metrics"]
    moved = [path for path in runs.folder().parent.iterdir() if path.name.startswith("seed1.")]
    assert len(moved) == 1 and json.loads((moved[0] / "record.json").read_text()) == record


def test_resume_false_does_not_overwrite(runs, monkeypatch):
    monkeypatch.setattr(Trainer, "_row", lambda self: (_ for _ in ()).throw(Unplugged))
    with pytest.raises(Unplugged):
        runs.launch("checkpoint_every=0")
    with refused("resume", False):
        runs.launch("resume=false")
    assert json.loads((runs.folder() / "record.json").read_text())["status"] == "failed"


def test_max_steps_ends_in_the_middle_of_an_epoch_with_a_row(runs):
    record = runs.launch("max_steps=25")
    assert record["steps"] == 25 and record["status"] == "finished"
    assert [row["step"] for row in runs.history("max_steps=25")] == [19, 25]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_hole_in_the_history_is_refused_not_filled_with_later_rows(runs, monkeypatch, lost):
    """Broken off an evaluation after its last checkpoint, so that one row more than it knows of is there."""
    append, overrides = records.append_row, ["epochs=5", "eval_every=1", "checkpoint_every=0"]

    def break_at_the_fourth(path, row):
        append(path, row)
        if row["epoch"] == 4:
            raise Unplugged

    monkeypatch.setattr(records, "append_row", break_at_the_fourth)
    with pytest.raises(Unplugged):
        runs.launch(*overrides)
    monkeypatch.undo()
    path = runs.folder(*overrides) / records.METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
    with refused(str(path), mentions="rerun=true"):
        runs.launch(*overrides)
    path.write_bytes(b"".join(lines))
    assert runs.launch(*overrides)["status"] == "finished"
    assert [row["epoch"] for row in runs.history(*overrides)] == [1, 2, 3, 4, 5]


def test_a_record_answers_for_its_own_run_only(runs):
    record = runs.launch("max_steps=1")
    other = runs.folder("max_steps=1", "seed=2")
    other.mkdir(parents=True)
    records.write_json(other / records.RECORD, record)
    with refused(str(other), mentions="seed 1"):
        runs.launch("max_steps=1", "seed=2")
    assert runs.launch("max_steps=1", "seed=2", "rerun=true")["seed"] == 2
