"""scripts/reproduce.py and a real Slurm: what is refused before anything is submitted, and what is made again."""

from dataclasses import replace

import pytest

from koala import records
from koala.reproduce.plan import Plan
from koala.reproduce.slurm import SlurmLauncher
from koala.runs import launch
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment

pytestmark = [pytest.mark.extended, pytest.mark.slurm, pytest.mark.timeout(280)]


def test_unknown_slurm_option_submits_nothing(slurm, run_door, tmp_path):
    done = run_door("scripts/reproduce.py", "quickstart", "--profile", "smoke", "--launcher", "slurm", "--slurm",
                    "partitoin=gpu", "--output", str(tmp_path / "outputs"), env=slurm.environment)  # fmt: skip
    assert done.returncode == 2 and "partitoin" in done.stderr
    assert not (tmp_path / "outputs/slurm").exists()


def test_what_older_code_recorded_is_made_again(slurm, monkeypatch, folders):
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, slurm.environment[key])
    extra = [*folders, "max_steps=1", "optim=sgd", "logger=none"]
    (run,) = Plan([load_experiment(EXPERIMENTS, "quickstart")], "smoke", extra=extra).runs[:1]
    launch(run.cfg)
    record = records.read_record(run.path)
    record["segments"][0]["numerics"] = 99
    records.write_json(run.path / records.RECORD, record)
    again = replace(run, again=True)
    events = [event for event in SlurmLauncher({"cpus_per_task": 1}).run([again], poll=0.5) if event]
    assert events[-1].state == "done" and "rerun" not in again.record()["command"]
    assert len(list(run.path.parent.glob("seed1.2*"))) == 1
