"""Runs through a real Slurm of one node: both doors, srun, preemption and the end of the time."""

import os
import signal
import sys

import pytest

from koala import cluster, records
from koala.runs import compose, launch, run_dir

pytestmark = [pytest.mark.extended, pytest.mark.slurm, pytest.mark.timeout(280)]

SWEEP = ["-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
TINY = ["data=digits", "batch_size=64", "model=mlp", "logger=none", "num_gpus=0"]
LONG = [*TINY, "epochs=40", "eval_every=20", "checkpoint_every=0", "log_every=4"]  # some seconds in which to disturb it


@pytest.fixture(autouse=True)
def talk_to_it(slurm, monkeypatch):
    """This process's submissions go to the tests' Slurm."""
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, slurm.environment[key])


def metrics(record: dict) -> dict:
    """What must not depend on how a run was started."""
    return record["metrics"] | {"steps": record["steps"], "status": record["status"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """``undisturbed(overrides)`` is the record of the same run in this process, elsewhere."""
    folder = tmp_path_factory.mktemp("undisturbed")  # a second call finds the first one's record

    def run(overrides) -> dict:
        return launch(compose([*overrides, f"output_root={folder}/outputs", f"data_root={folder}/data"]))

    return run


def test_sweep_through_hydra_gives_what_runs_by_hand_give(slurm, run_door, folders, undisturbed):
    sweep = [*TINY, "epochs=1", *folders, "optim=koala-m,sgd"]
    done = run_door("train.py", *SWEEP, *sweep, env=slurm.environment, timeout=240)
    assert done.returncode == 0, done.stderr
    for optim in ("koala-m", "sgd"):
        overrides = [*TINY, "epochs=1", f"optim={optim}"]
        folder = run_dir(compose([*overrides, *folders]))
        assert metrics(records.read_record(folder)) == metrics(undisturbed(overrides))
        assert str(folder / records.RECORD) in done.stdout  # what the job printed is in its log alone


def test_sweep_whose_job_refuses_its_data_ends_with_what_the_job_said(slurm, run_door, folders):
    sweep = [*TINY, "epochs=1", *folders, "data.size=9"]
    done = run_door("train.py", *SWEEP, *sweep, env=slurm.environment, timeout=240)
    assert done.returncode == 2 and "data.size=9" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_srun_makes_one_run_of_its_tasks(slurm, root, folders):
    run = [*TINY, "epochs=1", *folders]
    done = slurm.run("srun", "--ntasks=2", f"--chdir={root}", sys.executable, "train.py", *run, check=False)
    assert done.returncode == 0, done.stderr
    record = records.read_record(run_dir(compose([*run, "ranks=2"])))
    assert record["status"] == "finished" and record["world_size"] == 2
    assert done.stdout.count(records.RECORD) == 1


def wait_for_checkpoint(cfg, slurm, job) -> None:
    """Returns once the run has written its first checkpoint."""
    folder = run_dir(cfg) / "checkpoints"
    slurm.wait(lambda: any(folder.glob("step-*")), f"no checkpoint in {folder}", job)


@pytest.mark.parametrize("disturbance", ["preempted", "time nearly up"])
def test_disturbed_job_is_queued_again_and_ends_as_if_nothing_was(disturbance, slurm, folders, tmp_path, undisturbed):
    """Submitted and left alone (detached); what becomes of it is read from the queue and the record."""
    run = [*LONG, *folders]
    cfg = compose(run)
    (job,) = cluster.submit([run], {"cpus_per_task": 1})
    assert cluster.submit([run], {"cpus_per_task": 1}) == [], "a run that is in the queue is not submitted again"
    wait_for_checkpoint(cfg, slurm, job)
    assert cluster.queue([cfg])[run_dir(cfg)] == (job, "RUNNING")
    if disturbance == "preempted":
        slurm.run("scontrol", "requeue", job)  # SIGTERM, and the job goes back to the queue
    else:
        slurm.run("scancel", "--signal=USR2", job)  # what Slurm sends signal_delay_s before the end
    slurm.wait_for(job, "PENDING")
    assert records.read_record(run_dir(cfg)) is None and cluster.queue([cfg])[run_dir(cfg)][0] == job
    slurm.start_now(job)
    ended = slurm.wait_for(job, "COMPLETED", "FAILED")
    log = "".join(file.read_text() for file in (tmp_path / "outputs/slurm").rglob("*.out"))
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log
    record = records.read_record(run_dir(cfg))
    assert len(record["segments"]) == 2 and cluster.queue([cfg]) == {}
    assert metrics(record) == metrics(undisturbed(LONG))


def test_cancelled_job_stays_away_and_leaves_its_checkpoint(slurm, folders):
    run = [*LONG, *folders, "seed=2"]
    cfg = compose(run)
    (job,) = cluster.submit([run], {"cpus_per_task": 1})
    wait_for_checkpoint(cfg, slurm, job)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    assert cluster.queue([cfg]) == {} and records.read_record(run_dir(cfg)) is None
    assert any((run_dir(cfg) / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_table_from_jobs_left_alone_of_which_one_is_preempted(slurm, start_door, run_door, tmp_path):
    """Four optimizers, two seeds: submitted, left alone, one sent back to the queue, collected by the same command."""
    made = ["scripts/reproduce.py", "quickstart", "--launcher", "slurm", "--seeds", "1,2", "--output", str(tmp_path)]
    made += ["--slurm", "cpus_per_task=1", "epochs=4", "model.width=8", "logger=none", "checkpoint_every=0"]
    first = start_door(*made, env=slurm.environment)
    jobs = lambda: records.read_rows(tmp_path / cluster.JOBS)  # noqa: E731
    slurm.wait(lambda: len(jobs()) == 8, "no jobs were submitted", seconds=300)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(60) == 130, first.log.read_text()
    slurm.wait(lambda: any(tmp_path.glob("digits/**/step-*.pt")), "no run has written a checkpoint", seconds=300)
    run = next(tmp_path.glob("digits/**/step-*.pt")).parents[1]
    (job,) = [row["job"] for row in jobs() if row["run"] == str(run)]
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for(job, "PENDING")
    slurm.start_now(job)
    done = run_door(*made, env=slurm.environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert slurm.job(job)["Restarts"] == "1" and records.read_record(run)["status"] == "finished"
    (table,) = tmp_path.glob("tables/**/quickstart.md")
    assert table.read_text().count("(2)") >= 4
