"""A small real run: digits, a BatchNorm-free network, no mirror."""

from pathlib import Path

import pytest
import torch

from koala import records
from koala.training import compose, launch, run_dir

SMALL = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "epochs=2", "batch_size=64"]


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
        return sorted((self.folder(*overrides) / "checkpoints").glob("step-*.pt"))

    def weights(self, *overrides: str) -> dict[str, torch.Tensor]:
        """The weights of the last checkpoint."""
        return torch.load(self.checkpoints(*overrides)[-1], weights_only=True)["model"]


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)
