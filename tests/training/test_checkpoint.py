"""Checkpoints are written whole, checked when read, and never executed."""

import hashlib
import pickle

import pytest
import torch

from koala.errors import ConfigError
from koala.training import checkpoint


class Payload:
    """What a pickle could make a careless reader run."""

    def __reduce__(self):
        return eval, ("open('pwned', 'w').close()",)


def put(folder, step: int, content: bytes):
    """A file that is what its name says, whatever is in it."""
    folder.mkdir(exist_ok=True)
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
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="rerun=true"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("writer", [pickle.dumps, lambda value: _saved(value)], ids=["pickle", "torch.save"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / "checkpoints", 5, writer({"format": checkpoint.FORMAT, "step": 5, "model": Payload()}))
    with pytest.raises(ConfigError, match=path.name):
        checkpoint.load(tmp_path / "checkpoints")
    assert not (tmp_path / "pwned").exists()


def _saved(value) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_foreign_file_and_a_later_format_are_refused(tmp_path):
    put(tmp_path / "foreign", 1, _saved({"weights": torch.ones(3)}))
    with pytest.raises(ConfigError, match="not written by this suite"):
        checkpoint.load(tmp_path / "foreign")
    put(tmp_path / "later", 1, _saved({"format": 99, "step": 1, "model": {}}))
    with pytest.raises(ConfigError, match="format 99"):
        checkpoint.load(tmp_path / "later")


def test_one_of_another_run_is_refused(runs):
    runs.launch("max_steps=3")
    folder = runs.folder("max_steps=5") / "checkpoints"
    folder.mkdir(parents=True)
    other = runs.checkpoints("max_steps=3")[-1]
    (folder / other.name).write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="config_hash"):
        runs.launch("max_steps=5")


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    checkpoint.Writer(tmp_path).save(1, {"model": {"w": torch.ones(3)}})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.Writer(tmp_path).save(2, {"model": {"w": torch.zeros(3)}})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1
