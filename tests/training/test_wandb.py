"""Weights & Biases mirrors the records, and cannot end a run."""

import sys

import pytest

from koala.training import monitor

from ..wandb_offline import read_offline_run


def test_an_offline_run_holds_config_rows_summary_tags_and_group(runs):
    overrides = ["logger=wandb", "optim=koala-m", "epochs=2", "logger.tags=[trial]"]
    record = runs.launch(*overrides)
    run = read_offline_run(runs.folder(*overrides))
    assert run.config["optim"]["name"] == "koala-m" and run.config["seed"] == 1
    assert run.group == f"digits/mlp/koala-m/{record['config_hash']}"
    assert set(run.tags) == {"digits", "mlp", "koala-m", "trial"}
    rows = runs.history(*overrides)
    evaluated = [row for row in run.history if "test_loss" in row]
    assert [row["test_loss"] for row in evaluated] == [row["test_loss"] for row in rows]
    assert [row["_step"] for row in evaluated] == [row["step"] for row in rows]
    (line,) = [row for row in run.history if "log/loss" in row]  # every 20 steps of the 38
    assert line["_step"] == 20 and {"log/lr", "log/rate", "log/seconds_left", "log/R", "log/gain"} <= line.keys()
    assert run.summary["final/test_top1_error"] == record["metrics"]["final"]["test_top1_error"]
    assert run.summary["status"] == "finished"


def test_the_last_offline_run_of_a_resumed_run_has_every_row(runs):
    overrides = ["logger=wandb", "optim=sgd", "epochs=4", "checkpoint_every=0", "log_every=19"]
    runs.break_off(50, *overrides)
    runs.launch(*overrides)
    rows, logs = runs.history(*overrides), list(runs.folder(*overrides).rglob("run-*.wandb"))
    assert len(logs) == 2
    last = read_offline_run(max(logs, key=lambda log: log.stat().st_mtime).parent)
    evaluated = [row for row in last.history if "test_loss" in row]
    assert [(row["_step"], row["test_loss"]) for row in evaluated] == [(row["step"], row["test_loss"]) for row in rows]


@pytest.mark.parametrize(
    "moment, error", [("init", "TimeoutError"), ("log", "CommError"), ("finish", "BrokenPipeError")]
)
def test_whatever_happens_to_wandb_the_run_goes_on(runs, monkeypatch, moment, error, capsys):
    import wandb

    class Broken:
        summary: dict = {}

        def log(self, *_, **__):
            if moment == "log":
                raise wandb.errors.CommError("the network is gone")

        def finish(self, **_):
            raise BrokenPipeError("the service was killed")

    def init(**_):
        if moment == "init":
            raise TimeoutError("W&B does not answer")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    record = runs.launch("logger=wandb")
    assert record["status"] == "finished" and len(runs.history("logger=wandb")) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("rate, status, code", [(0.1, "finished", 0), (1e30, "diverged", 1)])
def test_the_mirror_of_a_run_is_closed_once_and_says_how_it_ended(runs, monkeypatch, rate, status, code):
    import wandb

    class Mirror:
        def __init__(self):
            self.summary, self.closed = {}, []

        def log(self, *_, **__):
            pass

        def finish(self, exit_code):
            self.closed.append((self.summary.get("status"), exit_code))

    mirror = Mirror()
    monkeypatch.setattr(wandb, "init", lambda **_: mirror)
    runs.launch("logger=wandb", "optim=sgd", f"optim.lr={rate}")
    assert mirror.closed == [(status, code)]


def test_offline_without_a_key_is_said_once(monkeypatch, capsys, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monitor.wandb_mode.cache_clear()
    assert monitor.wandb_mode() == "offline" and capsys.readouterr().err
    assert monitor.wandb_mode() == "offline" and not capsys.readouterr().err
    monitor.wandb_mode.cache_clear()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    if sys.platform != "win32":
        (tmp_path / ".netrc").chmod(0o600)
    assert monitor.wandb_mode() == "online"
    monitor.wandb_mode.cache_clear()


def test_a_netrc_that_cannot_be_read_holds_no_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spoil in (
        lambda path: path.mkdir(),  # as good as one without permission, which root reads all the same
        lambda path: path.write_bytes(b"machine api.wandb.ai login user password \xff\xfe\n"),
        lambda path: path.write_text("machine\n"),
    ):
        path = tmp_path / ".netrc"
        spoil(path)
        monitor.wandb_mode.cache_clear()
        assert monitor.wandb_mode() == "offline"
        path.rmdir() if path.is_dir() else path.unlink()
    monitor.wandb_mode.cache_clear()
