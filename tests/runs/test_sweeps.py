"""Sweepers are told what they minimise."""

import importlib
import os
import subprocess
import sys

import pytest
import yaml

from koala.records import read_record
from koala.runs.launch import objective
from tests.conftest import ROOT

compose = importlib.import_module("koala.runs.compose")  # koala.runs has a function of that name


def test_a_run_that_diverged_is_the_worst():
    assert objective({"status": "diverged"}, "val_loss") == float("inf")
    assert objective({"status": "finished", "metrics": {"final": {"val_loss": 0.5}}}, "val_loss") == 0.5


@pytest.mark.extended
def test_a_sweep_with_one_run_that_cannot_be_had_runs_none(run_door, tmp_path):
    small = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "max_steps=1"]
    done = run_door("train.py", "-m", *small, "optim=sgd", "optim.lr=0.1,-1")
    assert done.returncode == 2 and "-1" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "arguments, runs",
    [
        (["-m", "data=digits", "++optim.lr=0.1,0.2", "seed=1,2", "hydra/launcher=basic", "hydra.sweep.dir=x"], 4),
        (["--multirun", "optim=choice(sgd,adam)", "~model", "seed=range(1,4)"], 6),
        (["data=digits", "++optim.lr=-1"], 0),  # one run, which checks itself
        (["-m", "++optim.lr=interval(0.1,1)"], 0),
        (["-m", "hydra/sweeper=optuna", "++optim.lr=0.1,0.2"], 0),
        (["-m", "optim=glob(*)"], 0),
        (["-m", "optim=sgd,adam", "--config-dir", "mine"], 0),
        (["-m", "optim=[1"], 0),
    ],
)
def test_the_runs_of_a_sweep_are_those_that_hydra_will_make(monkeypatch, arguments, runs):
    seen = []
    monkeypatch.setattr(compose, "check", lambda run, typed: seen.append(tuple(run)))
    monkeypatch.setattr(compose, "hydra_config", lambda overrides: overrides)
    compose.check_sweep(arguments)
    assert len(seen) == len(set(seen)) == runs and not any("hydra" in text for run in seen for text in run)


@pytest.mark.extended
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
