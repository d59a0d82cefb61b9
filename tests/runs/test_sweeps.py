"""Sweepers are told what they minimise."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from koala.lock import Lock
from koala.records import read_record
from koala.runs import compose, run_dir, sweep
from koala.runs.folder import LOCK
from koala.runs.launch import objective
from tests.conftest import ROOT
from tests.refused import assert_names, refused


def test_a_run_that_diverged_or_has_no_number_is_the_worst():
    assert objective({"status": "diverged"}, "val_loss") == float("inf")
    assert objective({"status": "finished", "metrics": {"final": {"val_loss": None}}}, "val_loss") == float("inf")
    assert objective({"status": "finished", "metrics": {"final": {"val_loss": 0.5}}}, "val_loss") == 0.5


@pytest.mark.extended
def test_a_sweep_with_one_run_that_cannot_be_had_runs_none(run_door, tmp_path):
    small = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "max_steps=1"]
    done = run_door("train.py", "-m", *small, "optim=sgd", "optim.lr=0.1,-1")
    assert done.returncode == 2
    assert_names(done.stderr, "optim=sgd", "lr=-1.0")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "arguments, runs",
    [
        (["-m", "data=digits", "++optim.lr=0.1,0.2", "seed=1,2", "hydra/launcher=basic", "hydra.sweep.dir=x"], 4),
        (["--multirun", "optim=choice(sgd,adam)", "~model", "seed=range(1,4)"], 6),
        (["data=digits", "++optim.lr=-1"], 0),  # one run, which checks itself
        (["-m", "++optim.lr=interval(0.1,1)"], 0),
        (["-m", "hydra/sweeper=optuna", "++optim.lr=0.1,0.2"], 0),
        (["-m", "optim=glob(koala*)"], 3),
        (["hydra.mode=MULTIRUN", "optim=sgd,adam"], 2),
        (["-m", "optim=sgd,adam", "--config-name", "other"], 0),
        (["-m", "hydra.sweeper.params.optim='sgd,adam'"], 2),
        (["-m", "optim=[1"], 0),
    ],
)
def test_the_runs_of_a_sweep_are_those_that_hydra_will_make(monkeypatch, arguments, runs):
    seen = []
    monkeypatch.setattr(sweep, "check", lambda run, typed: seen.append(tuple(run)))
    monkeypatch.setattr(sweep, "hydra_config", lambda overrides, config_dir: overrides)
    monkeypatch.setattr(sweep, "build_dry", lambda run: None)
    monkeypatch.setattr(sweep, "_check_search", lambda parsed, config_dir: None)
    sweep.check_sweep(arguments)
    assert len(seen) == len(set(seen)) == runs and not any("hydra" in text for run in seen for text in run)


@pytest.mark.extended
def test_optuna_finds_the_lowest_of_what_was_run(tmp_path, folders):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweeps` is not installed")
    small = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "max_steps=2", "objective=train_loss"]
    done = subprocess.run(
        ["bash", "scripts/sweeps/optuna.sh", "hydra.sweeper.n_trials=3", "optim=sgd", *small, *folders],
        cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = yaml.safe_load((tmp_path / "outputs/sweeps/optimization_results.yaml").read_text())
    made = [read_record(path.parent) for path in tmp_path.rglob("record.json")]
    best = min(made, key=lambda record: record["metrics"]["final"]["train_loss"])
    assert len(made) == 3 and result["best_value"] == best["metrics"]["final"]["train_loss"]
    assert result["best_params"]["++optim.lr"] == best["config"]["optim"]["lr"]


SMALL = ["data=digits", "model=mlp", "logger=none", "num_gpus=0"]
OPTUNA = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1"]


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["data.validation=0"], "objective", "val_loss"),
        (["objective=accuracy"], "objective", "accuracy"),
        (["hydra.sweeper.direction=maximize"], "hydra.sweeper.direction", "maximize"),
    ],
)
def test_a_search_for_what_no_run_has_is_refused_before_the_first_trial(arguments, key, value):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweeps` is not installed")
    with refused(key, value):
        sweep.check_sweep([*OPTUNA, *SMALL, *arguments, "++optim.lr=interval(0.01,1)"])


def test_a_search_in_which_all_diverge_has_no_best(run_door, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweeps` is not installed")
    search = ["objective=train_loss", "max_steps=3", "optim=sgd", "++optim.lr=tag(log, interval(1e20, 1e30))"]
    done = run_door("train.py", *OPTUNA, "hydra.sweeper.direction=minimize", *SMALL, *search)
    assert done.returncode == sweep.DIVERGED, done.stderr


def test_a_run_of_a_sweep_that_is_refused_does_not_keep_the_others_from_running(run_door, folders):
    """Another process holds the second of three runs; the end names it."""
    overrides = [*SMALL, "optim=sgd", "max_steps=2", *folders]
    runs = [run_dir(compose([*overrides, f"seed={seed}"])) for seed in (1, 2, 3)]
    lock = Lock(runs[1] / LOCK)
    runs[1].mkdir(parents=True)
    lock.acquire()
    done = run_door("train.py", "-m", *overrides, "seed=1,2,3")
    lock.release()
    assert [(folder / "record.json").exists() for folder in runs] == [True, False, True]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert set(re.findall(r"seed=\d", done.stderr)) == {"seed=2"}


def test_files_in_a_folder_of_ones_own_are_checked_before_the_first_run(run_door, tmp_path):
    """The first of these two optimizers could be trained; the second is told before that."""
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim/mine.yaml").write_text("name: mine\n_target_: torch.optim.SGD\nlr: 0.1\n")
    (tmp_path / "optim/broken.yaml").write_text("name: broken\n_target_: torch.optim.SGD\nlr: -1\n")
    arguments = ["--config-dir", str(tmp_path), *SMALL, "max_steps=2"]
    assert [cfg.optim.name for cfg in sweep.check_sweep(["-m", *arguments, "optim=mine,sgd"]).runs.values()] == [
        "mine", "sgd"
    ]  # fmt: skip
    with refused("optim", "broken"):
        sweep.check_sweep(["-m", *arguments, "optim=mine,broken"])
    with refused("optim", "broken"):
        sweep.check_sweep(["-m", *arguments, "optim=glob([mine,broken])"])
