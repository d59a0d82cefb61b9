"""scripts/reproduce.py: what it runs, survives and says. Real runs, of one epoch on digits."""

import csv
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from koala.errors import ConfigError
from koala.reproduce import cli
from koala.reproduce.cli import main
from koala.reproduce.options import parse, plan_of
from koala.reproduce.plan import Plan
from koala.tables import write
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment
from tests.conftest import run_forked
from tests.refused import assert_names
from tests.reproduce.test_search import finish

DOOR = "scripts/reproduce.py"
SMOKE = ("quickstart", "--profile", "smoke", "--jobs", "1", "epochs=2")


def plan(*names, profile="smoke", **options):
    return Plan([load_experiment(EXPERIMENTS, name) for name in names], profile, **options)


def errors(output: Path, profile: str = "smoke") -> list[dict]:
    """The quickstart's cells, without what the clock says."""
    rows = csv.DictReader((output / f"tables/{profile}/tables/quickstart.csv").open())
    columns = ("optim", "value", "std", "n", "status", "configs")
    return [{key: row[key] for key in columns} for row in rows if row["metric"] == "error"]


def records(output: Path) -> dict[Path, int]:
    """Finished runs and when they were written."""
    return {path: path.stat().st_mtime_ns for path in output.glob("digits/*/*/*/seed*/record.json")}


def children(pid: int) -> list[int]:
    """Processes that `pid` started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


shares_the_undisturbed = pytest.mark.xdist_group("undisturbed")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, str]:
    """An output folder with the smoke quickstart run to its end, and what the command printed."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = run_forked([DOOR, *SMOKE, "--output", str(output)], output / "said", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


@pytest.mark.dist
@shares_the_undisturbed
def test_runs_renders_and_prints_where(undisturbed):
    output, printed = undisturbed
    rows = errors(output)
    assert [row["optim"] for row in rows] == ["koala-v", "koala-m", "sgd", "adam"]
    for row in rows:
        [path] = [path for path in records(output) if path.parts[-3] == row["configs"]]
        record = json.loads(path.read_text())
        assert float(row["value"]) == record["metrics"]["final"]["test_top1_error"]
        assert record["command"].startswith("python train.py data=digits") and "seed=1" in record["command"]
    assert f"{output}/tables/smoke/tables/quickstart.md" in printed and "KOALA-M" in printed


@pytest.mark.extended
@pytest.mark.dist
@shares_the_undisturbed
def test_second_time_runs_nothing(undisturbed, run_door):
    output, _ = undisturbed
    before = records(output)
    assert run_door(DOOR, *SMOKE, "--output", str(output)).returncode == 0
    assert records(output) == before


@pytest.mark.extended
@pytest.mark.dist
@shares_the_undisturbed
def test_killed_and_started_again_repeats_nothing_and_ends_the_same(undisturbed, start_door, run_door, tmp_path):
    process = start_door(DOOR, *SMOKE, "--output", str(tmp_path))
    workers, done = [], {}
    while not done:
        assert process.poll() is None, process.log.read_text()
        workers, done = children(process.pid), records(tmp_path)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # no worker outlives its command
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = records(tmp_path)
    again = run_door(DOOR, *SMOKE, "--output", str(tmp_path), timeout=280)
    assert again.returncode == 0, again.stdout + again.stderr
    made = records(tmp_path)
    assert len(made) == 4 and {path: made[path] for path in kept} == kept
    ours, theirs = errors(tmp_path), errors(undisturbed[0])
    for row in ours + theirs:
        del row["configs"]
    assert ours == theirs


@pytest.mark.extended
@pytest.mark.dist
def test_failed_run_is_named_and_the_others_go_on(run_door, tmp_path):
    (tmp_path / "digits/resnet18").mkdir(parents=True)
    (tmp_path / "digits/resnet18/koala-m").write_text("in the way")
    done = run_door(DOOR, *SMOKE[:-1], "max_steps=1", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "digits/resnet18/koala-m/" in done.stdout and "optim=koala-m" in done.stdout
    assert [row["status"] for row in errors(tmp_path)] == ["", "not run", "", ""]


@pytest.mark.extended
@pytest.mark.dist
def test_interrupted_command_leaves_checkpoints_and_is_resumed(start_door, run_door, tmp_path):
    command = (DOOR, *SMOKE[:-1], "epochs=2", "checkpoint_every=1000", "--output", str(tmp_path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children would ignore it
    process = start_door(*command)
    signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("digits/*/*/*/seed1/metrics.jsonl")):
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)  # as `kill -INT` sends it, to the command alone
    assert process.wait(60) == 130
    assert list(tmp_path.glob("digits/*/*/*/seed1/checkpoints/*")) or records(tmp_path)
    assert run_door(*command, timeout=280).returncode == 0 and len(records(tmp_path)) == 4


@pytest.mark.extended
@pytest.mark.dist
def test_second_command_waits_for_the_first_and_takes_over_when_that_is_killed(start_door, tmp_path):
    command = (DOOR, *SMOKE[:-1], "max_steps=2", "--output", str(tmp_path))
    first = start_door(*command)
    while not list(tmp_path.glob("reproduce/*.lock")):
        assert first.poll() is None, first.log.read_text()
        time.sleep(0.02)
    second = start_door(*command)
    while not second.log.read_text():  # it says that it waits
        assert second.poll() is None and first.poll() is None, second.log.read_text()
        time.sleep(0.02)
    first.kill()
    first.wait()
    kept = records(tmp_path)
    assert second.wait(250) == 0, second.log.read_text()
    made = records(tmp_path)
    assert len(made) == 4 and {path: made[path] for path in kept} == kept


def test_unreadable_record_is_named(tmp_path, monkeypatch, capsys):
    [run] = plan("quickstart", seeds=[1], extra=[f"output_root={tmp_path}", "optim=sgd"]).runs[:1]
    run.path.mkdir(parents=True)
    (run.path / "record.json").write_text("{torn")
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--profile", "smoke", "--output", str(tmp_path), "optim=sgd"]) == 2
    assert_names(capsys.readouterr().err, run.path / "record.json")


def test_waiting_command_that_is_interrupted_leaves_the_other_working(tmp_path, monkeypatch, capsys):
    command = [*SMOKE, "--output", str(tmp_path / "out")]
    lock = cli._lock(str(tmp_path / "out"), plan_of(parse(command)))
    lock.path.parent.mkdir(parents=True)
    monkeypatch.setattr(time, "sleep", Mock(side_effect=KeyboardInterrupt))
    with ThreadPoolExecutor(1) as another:
        another.submit(lock.acquire).result()
        assert main(command) == 130
        another.submit(lock.release).result()
    assert_names(capsys.readouterr().out.splitlines()[-1], 4)  # runs to go


def test_short_profile_of_a_timed_table_runs_side_by_side():
    """It has no times worth comparing; that others do not is refused before anything is composed."""
    assert parse(["board", "--profile", "smoke", "--jobs", "2"]).jobs == 2
    options = parse(["quickstart", "--profile", "smoke", "--jobs", "2"])
    assert plan_of(options).runs and options.jobs == 2


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["koala/table99"], "experiments/koala/table99.yaml", None),
        (["quickstart", "--profile", "tiny"], "experiments/quickstart.yaml", None),
        (["quickstart", "optim.lrr=1"], "optim.lrr", None),
        (["quickstart", "--seeds", "1-3"], "--seeds", "1-3"),
        (["quickstart", "--seeds", "1,5000000000"], "--seeds", "1,5000000000"),
        (["quickstart", "--seeds", ""], "--seeds", ""),
        (["quickstart", "--only", "optim"], "--only", "optim"),
        (["quickstart", "--only", "rate=1"], "--only: quickstart", "rate"),
        (["quickstart", "--only", "optim=sgd,koala"], "--only: quickstart: optim", "koala"),
        (["board", "--only", "optim=sgd"], "--only", "optim"),
        (
            ["koala/table6", "--only", "data=imagenet32", "--only", "epochs=200"],
            "--only",
            {"data": ["imagenet32"], "epochs": ["200"]},
        ),
        (["quickstart", "seed=5"], "seed", "5"),
        (["quickstart", "--seeds", "1", "model.width=4", "--collect"], "model.width", "4"),
        (["quickstart", "num_gpus=0", "+epochs=1", "--collect"], "epochs", "1"),
        (["quickstart", "num_gpus=8", "--collect"], "num_gpus", "8"),
        (["quickstart", "++cpu_procs=2", "--collect"], "cpu_procs", "2"),
        (["quickstart", "--jobs", "0"], "--jobs", 0),
        (["board", "--profile", "cpu-times", "--jobs", "2"], "--jobs", 2),
        (["quickstart", "--data-path", "ptb"], "--data-path", "ptb"),
        (["quickstart", "--data-path", "cifar=x"], "--data-path", "cifar"),
        (["quickstart", "--slurm", "partition=gpu"], "--slurm", "partition=gpu"),
        (["quickstart", "--launcher", "slurm", "--jobs", "2"], "--jobs", 2),
        (["epochs=1"], "TABLE", None),
    ],
)
def test_bad_input_is_named(arguments, key, value):
    with pytest.raises(ConfigError) as caught:
        plan_of(parse(arguments))
    assert key in caught.value.key and value in (None, caught.value.value)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["quickstart", "--data-path", "cifar=x"], "cifar10"),
        ([*SMOKE, "--output", "file"], "--output=file"),
        ([*SMOKE, "--output", "/proc/none/out"], "--output=/proc/none/out"),
        (["quickstart", "num_gpus=0", "--measured"], "--measured"),  # times of another command
    ],
)
def test_bad_input_is_one_line_and_does_no_work(monkeypatch, capsys, tmp_path, arguments, name):
    (tmp_path / "file").write_text("somebody's")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert_names(capsys.readouterr().err, name)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody's"]


def test_what_changes_no_number_may_be_collected(capsys, tmp_path, monkeypatch):
    """What scripts/measure.sh says, among others."""
    monkeypatch.chdir(tmp_path)
    harmless = ["num_gpus=0", "logger=none", "data.workers=1", "--seeds", "2,2"]
    assert main(["koala/table4", "--profile", "smoke", *harmless, "--collect", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("python train.py") == 4  # of four cells with seed 2


@pytest.fixture
def finished(tmp_path) -> list[str]:
    """Arguments of a command whose runs have records already."""
    done = plan(SMOKE[0], extra=[f"output_root={tmp_path}"])
    finish(done, lambda optim, rate: 1.0)
    return [*SMOKE[:3], "--output", str(tmp_path)]


def test_torn_rows_of_another_table_are_in_nobodys_way(finished, tmp_path):
    torn = tmp_path / "tables/smoke/measured/koala/table4/smoke/128.jsonl"
    torn.parent.mkdir(parents=True)
    torn.write_text("{torn")
    assert main(finished) == 0 and torn.read_text() == "{torn"


@pytest.mark.extended
def test_report_stands_though_wandb_is_out_of_reach(finished, capsys, monkeypatch):
    from wandb.errors import CommError

    monkeypatch.setattr(write, "log_wandb", Mock(side_effect=CommError("no [route] to host")))
    assert main([*finished, "logger=wandb"]) == 0
    said = capsys.readouterr().out
    assert "CommError: no [route] to host" in said and "tables/smoke/tables/quickstart.md" in said


@pytest.mark.slow
def test_all_tables_smoke(run_door, tmp_path):
    done = run_door(DOOR, "all", "--profile", "smoke", "--output", str(tmp_path), timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
    statuses = [
        row["status"]
        for path in (tmp_path / "tables/smoke/tables").rglob("*.csv")
        for row in csv.DictReader(path.open())
    ]
    assert set(statuses) <= {"", "blocked", "left out", "not reached", "diverged", "not measured together"}
