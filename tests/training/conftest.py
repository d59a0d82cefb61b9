"""A small real run: digits, a BatchNorm-free network, no mirror; its ranks cost a fork each."""

import contextlib
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from koala import records
from koala.runs import compose, launch, run_dir
from koala.training import shards, workers
from koala.training.step import Step
from tests.conftest import CONTEXT

SMALL = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "epochs=2", "batch_size=64"]


def whole_state(path: Path) -> dict:
    """What a checkpoint holds, its shards put together."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    result = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    here, wanted = {}, {}
    for name, tensor in result.items():
        *parents, key = name.split("/")
        position = here
        for parent in parents:
            position = position.setdefault(parent, {})
        position[key] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
    state = shards.put_back(torch.load(path / "state.pt", weights_only=True), here, wanted)
    shards.read(path, wanted)
    return state


def same_bits(one, other) -> bool:
    """Equality of nested dicts, lists and tensors, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one == other


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def closest(one: dict, other: dict) -> float:
    """The largest difference between two networks' weights."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


class Unplugged(Exception):
    """A run stopped dead."""


@contextlib.contextmanager
def unplugged_before(step: int):
    """Runs in this process stop dead before a step."""
    step_on = Step.__call__

    def dying(self, batch, count, number):
        if number == step:
            raise Unplugged
        return step_on(self, batch, count, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", dying)
        yield


class Runs:
    """Composes and runs small runs below one folder, and reads back what they left."""

    def __init__(self, root: Path):
        self.root = root
        self.places = [f"output_root={root / 'outputs'}", f"data_root={root / 'data'}"]

    def compose(self, *overrides: str):
        return compose([*SMALL, *self.places, *overrides])

    def launch(self, *overrides: str) -> dict:
        return launch(self.compose(*overrides))

    def break_off(self, step: int, *overrides: str) -> None:
        """Runs until `step`, where the plug is pulled."""
        with unplugged_before(step), pytest.raises(Unplugged):
            self.launch(*overrides)

    def elsewhere(self, name: str) -> str:
        """The override that keeps a run apart from those of the same overrides."""
        return f"output_root={self.root / name}"

    def folder(self, *overrides: str) -> Path:
        return run_dir(self.compose(*overrides))

    def history(self, *overrides: str) -> list[dict]:
        return records.read_history(self.folder(*overrides))

    def checkpoints(self, *overrides: str) -> list[Path]:
        return sorted((self.folder(*overrides) / "checkpoints").glob("step-*"))

    def weights(self, *overrides: str) -> dict[str, torch.Tensor]:
        """The weights of the last checkpoint."""
        return whole_state(self.checkpoints(*overrides)[-1])["model"]


@pytest.fixture(autouse=True)
def forked_ranks(monkeypatch):
    """Workers come from the server that has imported everything; those of tests/faults and the doors are spawned."""
    config = partial(workers.LaunchConfig, start_method=CONTEXT.get_start_method())
    monkeypatch.setattr(workers, "LaunchConfig", config)


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)
