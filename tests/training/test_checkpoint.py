"""Checkpoints are written whole, checked when read, and never executed."""

import hashlib
import io
import pickle
import threading

import pytest
import torch

from koala.training import checkpoint
from tests.refused import refused
from tests.training.conftest import Runs


class Payload:
    """What a pickle could make a careless reader run."""

    def __reduce__(self):
        return eval, ("open('pwned', 'w').close()",)


def put(folder, step: int, content: bytes):
    """A file that is what its name says, whatever is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}-000001-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.write_bytes(content)
    return path


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    for step in (1, 2, 3):
        checkpoint.Writer(tmp_path).save(step, {"model": {"w": torch.full((3,), float(step))}})
    assert len(list(tmp_path.iterdir())) == checkpoint.KEEP == 2
    assert checkpoint.load(tmp_path)["model"]["w"].tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage):
    checkpoint.Writer(tmp_path).save(1, {"model": {"w": torch.ones(100)}})
    checkpoint.Writer(tmp_path).save(2, {"model": {"w": torch.zeros(100)}})
    newest = max(tmp_path.iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"torn": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match=newest.name):
        assert checkpoint.load(tmp_path)["model"]["w"].sum() == 100


def test_nothing_sound_left_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert checkpoint.load(tmp_path) is None
    checkpoint.Writer(tmp_path).save(1, {"model": {}})
    next(tmp_path.iterdir()).write_bytes(b"x")
    with pytest.warns(UserWarning), refused(str(next(tmp_path.iterdir())), None, checkpoint.AGAIN):
        checkpoint.load(tmp_path)


def _saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("writer", [pickle.dumps, _saved])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / "checkpoints", 5, writer({"format": checkpoint.FORMAT, "step": 5, "model": Payload()}))
    with refused(str(path), None, checkpoint.AGAIN):
        checkpoint.load(tmp_path / "checkpoints")
    assert not (tmp_path / "pwned").exists()


def test_a_foreign_file_and_a_later_format_are_refused(tmp_path):
    for content in ({"weights": torch.ones(3)}, {"format": 99, "step": 1, "model": {}}):
        path = put(tmp_path, 1, _saved(content))
        with refused(str(path), None, checkpoint.AGAIN):
            checkpoint.load(tmp_path)
        path.unlink()


def test_one_of_another_run_is_refused(runs):
    runs.launch("max_steps=3")
    folder = runs.folder("max_steps=5") / "checkpoints"
    folder.mkdir(parents=True)
    other = runs.checkpoints("max_steps=3")[-1]
    (folder / other.name).write_bytes(other.read_bytes())
    with refused(str(folder / other.name), mentions="config_hash"):
        runs.launch("max_steps=5")


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch, background):
    writer = checkpoint.Writer(tmp_path, background=background)
    writer.save(1, {"model": {"w": torch.ones(3)}})
    writer.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError) as caught:
        writer.save(2, {"model": {"w": torch.zeros(3)}})
        writer.join()
        writer.check()
    monkeypatch.undo()
    assert caught.value.errno == 28 and checkpoint.load(tmp_path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_the_last_one_written_is_gone_on_from_whatever_its_step_or_checksum(tmp_path):
    """A step is saved twice when its evaluation comes between; and a run may have gone back some steps."""
    writer = checkpoint.Writer(tmp_path)
    for number in range(6):
        writer.save(7, {"model": {"w": torch.full((3,), float(number))}})
        assert checkpoint.load(tmp_path)["model"]["w"][0] == number
    checkpoint.Writer(tmp_path).save(3, {"model": {"w": torch.full((3,), 9.0)}})
    assert checkpoint.load(tmp_path)["step"] == 3


FOREIGN = {
    "format is a word": lambda state: state | {"format": "newest"},
    "no optimizer": lambda state: {key: value for key, value in state.items() if key != "optimizer"},
    "weight of another shape": lambda state: state | {
        "model": {name: tensor[..., :1].clone() for name, tensor in state["model"].items()}
    },
    "weights by other names": lambda state: state | {"model": {f"x.{name}": 1 for name in state["model"]}},
    "position is a list": lambda state: state | {"position": [1, 2]},
    "tally of another task": lambda state: state | {"tally": torch.zeros(9)},
    "segments without seconds": lambda state: state | {"segments": [{}]},
    "optimizer of another kind": lambda state: state | {"optimizer": {"state": {}, "param_groups": []}},
    "a tensor": lambda state: torch.ones(3),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps and its last checkpoint's state."""
    runs = Runs(tmp_path_factory.mktemp("finished"))
    runs.launch("max_steps=3")
    return runs, torch.load(runs.checkpoints("max_steps=3")[-1], weights_only=True)


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_right_checksum_over_foreign_content_is_one_refusal(finished, tmp_path, change):
    runs, state = finished
    elsewhere = [f"output_root={tmp_path}", "max_steps=3"]
    path = put(runs.folder(*elsewhere) / "checkpoints", 3, _saved(change(state)))
    with refused(str(path), None, checkpoint.AGAIN):
        runs.launch(*elsewhere)


def test_written_beside_training_it_holds_what_was_when_it_was_asked_for(tmp_path, monkeypatch):
    changed, write = threading.Event(), checkpoint.Writer._write
    monkeypatch.setattr(checkpoint.Writer, "_write", lambda *args: changed.wait(60) and write(*args))
    writer, weights = checkpoint.Writer(tmp_path, background=True), torch.ones(3)
    writer.save(1, {"model": {"w": weights}})
    weights.zero_()
    changed.set()
    writer.wait()
    assert checkpoint.load(tmp_path)["model"]["w"].all()
