"""A small real run: digits, a BatchNorm-free network, no mirror; its ranks cost a fork each."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from koala import records
from koala.runs import compose, launch, run_dir
from koala.training import shards, workers
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


class Runs:
    """Composes and runs small runs below one folder, and reads back what they left."""

    def __init__(self, root: Path):
        self.places = [f"output_root={root / 'outputs'}", f"data_root={root / 'data'}"]

    def compose(self, *overrides: str):
        return compose([*SMALL, *self.places, *overrides])

    def launch(self, *overrides: str) -> dict:
        return launch(self.compose(*overrides))

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
