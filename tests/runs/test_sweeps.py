"""Sweepers are told what they minimise."""

import os
import subprocess
import sys

import pytest
import yaml

from koala.records import read_record
from koala.runs.launch import objective
from tests.conftest import ROOT


def test_a_run_that_diverged_is_the_worst():
    assert objective({"status": "diverged"}, "val_loss") == float("inf")
    assert objective({"status": "finished", "metrics": {"final": {"val_loss": 0.5}}}, "val_loss") == 0.5


def test_optuna_finds_the_lowest_of_what_was_run(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweeps` is not installed")
    small = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "max_steps=2", "objective=train_loss"]
    places = [f"output_root={tmp_path}/out", f"data_root={tmp_path}/data"]
    done = subprocess.run(
        ["bash", "scripts/sweeps/optuna.sh", "hydra.sweeper.n_trials=3", "optim=sgd", *small, *places],
        cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "out/sweeps/optimization_results.yaml").read_text())
    made = [read_record(path.parent) for path in tmp_path.rglob("record.json")]
    best = min(made, key=lambda record: record["metrics"]["final"]["train_loss"])
    assert len(made) == 3 and found["best_value"] == best["metrics"]["final"]["train_loss"]
    assert found["best_params"]["++optim.lr"] == best["config"]["optim"]["lr"]
