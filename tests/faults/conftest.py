"""Runs that are broken off from outside, as many as one likes: a life of a run costs a fork, not an import of torch."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from koala import records
from koala.runs import compose, launch, run_dir
from tests.cluster.one_node_slurm import free_port
from tests.conftest import CONTEXT
from tests.training.conftest import whole_state, without_times

SMALL = ["data=digits", "batch_size=64", "model=mlp", "logger=none", "num_gpus=0"]


def live(overrides: list[str], log: Path, launch=launch, environment: dict[str, str] | None = None) -> None:
    """One life of a run, or of one rank of it: ``python train.py *overrides``, with its output in ``log``."""
    os.environ.update(environment or {})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    launch(compose(overrides))


class Victim:
    """A run below a folder of its own; ``start`` gives it a life, and its traces tell how far it has come."""

    def __init__(self, folder: Path, *overrides: str):
        self.root, self.given = folder, overrides
        self.overrides = [*SMALL, *overrides, f"output_root={folder}/outputs", f"data_root={folder}/data"]
        self.cfg = compose(self.overrides)
        self.folder = run_dir(self.cfg)
        self.log = folder / "victim.log"

    def start(self, launch=launch) -> multiprocessing.Process:
        """A process at work on the run, by ``launch(cfg)``."""
        process = CONTEXT.Process(target=live, args=(self.overrides, self.log, launch))
        process.start()
        return process

    def start_ranks(self, world: int, launch=launch) -> list[multiprocessing.Process]:
        """Ranks at work on the run, as torchrun would start them but forked, which saves seconds each."""
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        ranks = [CONTEXT.Process(target=live, args=(self.overrides, self.log, launch, one)) for one in environments]
        for rank in ranks:
            rank.start()
        return ranks

    def finish(self, world: int | None = None) -> dict:
        """Lets the run go on to its end, by ranks that are started here if their number is given; the record."""
        for process in self.start_ranks(world) if world else [self.start()]:
            process.join(240)
            assert process.exitcode == 0, self.log.read_text()[-3000:]
        return records.read_record(self.folder)

    def step(self) -> int:
        """Step of the newest checkpoint, 0 when there is none."""
        actual = self.checkpoints()
        return int(actual[-1].name.split("-")[1]) if actual else 0

    def checkpoints(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def lives(self) -> list[int]:
        """The steps at which the run was begun and resumed, of what its record was made from."""
        return [segment["from"] for segment in records.read_record(self.folder)["segments"]]

    def result(self) -> dict:
        """What must be the same bits however the run was disturbed: weights, optimizer, history and metrics."""
        state = whole_state(self.checkpoints()[-1])
        return {
            "model": state["model"],
            "optimizer": state["optimizer"]["state"],
            "history": without_times(records.read_history(self.folder)),
            "metrics": records.read_record(self.folder)["metrics"],
        }


@pytest.fixture
def victim(tmp_path):
    """``victim(*overrides, name="victim") -> Victim`` below ``tmp_path``."""

    def make(*overrides: str, name: str = "victim") -> Victim:
        (tmp_path / name).mkdir(exist_ok=True)
        return Victim(tmp_path / name, *overrides)

    return make
