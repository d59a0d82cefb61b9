"""The workers of scripts/reproduce.py: how they die, where they write, and what they note of a run."""

import multiprocessing
from dataclasses import replace

import pytest

from koala.errors import ConfigError
from koala.lock import Lock
from koala.records import read_record, write_json
from koala.reproduce.local import LocalLauncher, log_of
from koala.reproduce.plan import Plan, Run
from koala.runs import launch
from koala.runs.folder import LOCK
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment
from koala.training.loop import Trainer

pytestmark = pytest.mark.extended


def runs_of(extra: list[str]) -> list[Run]:
    """Runs of the smallest quickstart."""
    return Plan([load_experiment(EXPERIMENTS, "quickstart")], "smoke", extra=[*extra, "logger=none"]).runs


@pytest.mark.dist
def test_killed_worker_is_replaced_and_its_run_finished(tmp_path):
    runs = runs_of([f"output_root={tmp_path}", "epochs=2"])[:2]
    events, killed, others = [], [], multiprocessing.active_children()
    for event in LocalLauncher(jobs=1, threads=1).run(runs, poll=0.05):
        events += [event] if event else []
        at_work = not killed and (runs[0].path / "metrics.jsonl").exists()
        idle = event is not None and (event.state, event.run) == ("done", runs[0])
        if at_work or idle:
            [worker] = [child for child in multiprocessing.active_children() if child not in others]
            worker.kill()
            worker.join()
            killed.append("at work" if at_work else "idle")
    assert killed == ["at work", "idle"] and [event.state for event in events if event.run == runs[1]][-1] == "done"
    assert all(run.record()["status"] == "finished" for run in runs)


@pytest.mark.dist
def test_what_is_noted_of_a_run_that_is_made_again_and_of_one_that_goes_on(tmp_path, monkeypatch):
    """The folder of the first is moved aside and its log is not; the second was not timed from start to end."""

    def interrupted(trainer):
        trainer.save()
        raise KeyboardInterrupt  # before there is a row

    older, begun = runs_of([f"output_root={tmp_path}", "max_steps=4"])[:2]
    launch(older.cfg)
    record = read_record(older.path)
    record["segments"][0]["numerics"] = 99
    write_json(older.path / "record.json", record)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_between_steps", interrupted)
        launch(begun.cfg)
    assert not (begun.path / "metrics.jsonl").exists()
    again = replace(older, again=True)
    events = [event.state for event in LocalLauncher(jobs=1, threads=1).run([again, begun]) if event]
    assert events == ["running", "done"] * 2
    (aside,) = older.path.parent.glob("seed1.2*")
    assert "train_loss" in older.path.with_name("seed1.log").read_text() and not list(aside.glob("*.log"))
    assert again.row()["timing"]["jobs"] == 1
    assert begun.row()["status"] == "finished" and "timing" not in begun.row()


@pytest.mark.dist
def test_a_run_that_another_command_works_on_is_waited_for(tmp_path):
    """Commands for other cells, profiles or tables may share runs."""
    [run] = runs_of([f"output_root={tmp_path}", "max_steps=1"])[:1]
    run.path.mkdir(parents=True)
    other, events = Lock(run.path / LOCK), []
    other.acquire()
    for event in LocalLauncher(jobs=1, threads=1).run([run], poll=0.05):
        events += [event] if event else []
        log = log_of(run.path)
        if log.exists() and log.stat().st_size:
            other.release()
    assert [event.state for event in events] == ["running", "done"] and run.record()["status"] == "finished"


@pytest.mark.parametrize(
    "table, profile, visible, jobs, gpus",
    [
        ("koala/table4", "smoke", None, 2, ["0", "1"]),
        ("koala/table4", "smoke", "GPU-1a, 3", 2, ["GPU-1a", "3"]),
        ("quickstart", "smoke", "2,3", 2, ["2", "3"]),
        ("quickstart", "full", "2,3", 1, ["2"]),  # compares times
    ],
)
def test_workers_get_the_gpus_that_the_command_may_use(monkeypatch, tmp_path, table, profile, visible, jobs, gpus):
    from koala.reproduce import cli, options

    launchers = []

    def noted(*args):
        launchers.append(args)
        raise ConfigError("seed", 1, "enough")

    monkeypatch.setattr(options, "LocalLauncher", noted)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")  # OpenMP's own way to say it level by level
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cli.main([table, "--profile", profile, "--output", str(tmp_path), "num_gpus=auto"])
    assert launchers == [(jobs, 3, gpus)]
