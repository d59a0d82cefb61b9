"""scripts/reproduce.py: what it runs, survives and says. Real runs, of one epoch on digits."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from koala import terminal
from koala.errors import ConfigError
from koala.reproduce.options import parse, plan_of
from koala.reproduce.plan import Plan
from koala.reproduce.progress import Event, RunProgress
from koala.runs import compose
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment
from tests.conftest import run_forked

DOOR = "scripts/reproduce.py"
SMOKE = ("quickstart", "--profile", "smoke", "--jobs", "1", "epochs=2")
STATUSES = {"", "blocked", "left out", "not reached", "diverged", "not measured together"}
ERRORS = {"optim", "metric", "value", "std", "n", "status", "configs"}


def plan(*names, profile="smoke", **options):
    return Plan([load_experiment(EXPERIMENTS, name) for name in names], profile, **options)


def errors(output: Path, profile: str = "smoke") -> list[dict]:
    """The quickstart's cells, without what the clock says."""
    rows = csv.DictReader((output / f"tables/{profile}/tables/quickstart.csv").open())
    return [{key: row[key] for key in ERRORS} for row in rows if row["metric"] == "error"]


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
    assert "4 of 4 runs done, 0 failed" in printed and f"{output}/tables/smoke/tables/quickstart.md" in printed
    assert "KOALA-M" in printed


@pytest.mark.extended
@pytest.mark.dist
@shares_the_undisturbed
def test_second_time_runs_nothing(undisturbed, run_door):
    output, _ = undisturbed
    before = records(output)
    done = run_door(DOOR, *SMOKE, "--output", str(output))
    assert done.returncode == 0 and "0 runs to do, 4 done" in done.stdout
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
    again = run_door(DOOR, *SMOKE, "--output", str(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{4 - len(kept)} runs to do, {len(kept)} done" in again.stdout
    assert {path: records(tmp_path)[path] for path in kept} == kept
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
    assert "3 of 4 runs done, 1 failed" in done.stdout
    assert "failed: digits/resnet18/koala-m/" in done.stdout and "optim=koala-m" in done.stdout
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
    assert "the same command resumes them" in process.log.read_text()
    assert list(tmp_path.glob("digits/*/*/*/seed1/checkpoints/*")) or records(tmp_path)
    assert run_door(*command).returncode == 0 and len(records(tmp_path)) == 4


@pytest.mark.extended
@pytest.mark.dist
def test_second_command_waits_for_the_first_and_takes_over_when_that_is_killed(start_door, tmp_path):
    command = (DOOR, *SMOKE[:-1], "max_steps=2", "--output", str(tmp_path))
    first = start_door(*command)
    while not list(tmp_path.glob("reproduce/*.lock")):
        assert first.poll() is None, first.log.read_text()
        time.sleep(0.02)
    second = start_door(*command)
    while "this one waits" not in second.log.read_text():
        assert second.poll() is None and first.poll() is None, second.log.read_text()
        time.sleep(0.02)
    first.kill()
    first.wait()
    kept = records(tmp_path)
    assert second.wait(250) == 0, second.log.read_text()
    made = records(tmp_path)
    assert len(made) == 4 and {path: made[path] for path in kept} == kept


def test_unreadable_record_is_named(tmp_path, monkeypatch, capsys):
    from koala.reproduce.cli import main

    [run] = plan("quickstart", seeds=[1], extra=[f"output_root={tmp_path}", "optim=sgd"]).runs[:1]
    run.path.mkdir(parents=True)
    (run.path / "record.json").write_text("{torn")
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--profile", "smoke", "--output", str(tmp_path), "optim=sgd"]) == 2
    assert f"{run.path}/record.json: " in capsys.readouterr().err


def test_waiting_command_that_is_interrupted_leaves_the_other_working(tmp_path, monkeypatch, capsys):
    from koala.reproduce import cli

    def interrupted(progress):
        raise KeyboardInterrupt

    command = [*SMOKE, "--output", str(tmp_path / "out")]
    lock = cli._lock(str(tmp_path / "out"), plan_of(parse(command)))
    lock.path.parent.mkdir(parents=True)
    monkeypatch.setattr(RunProgress, "read_records", interrupted)
    with lock:
        assert cli.main(command) == 130
    assert "4 runs to go; the other command continues with them" in capsys.readouterr().out


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
    assert key in str(caught.value) and (value is None or caught.value.value == value)


def test_bad_input_is_one_line_and_does_no_work(monkeypatch, capsys, tmp_path):
    from koala.reproduce.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--data-path", "cifar=x", "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert "cifar10" in said and said.count("\n") == 1 and not any(tmp_path.iterdir())


def test_output_that_is_no_folder_does_no_work(capsys, tmp_path):
    from koala.reproduce.cli import main

    (tmp_path / "out").write_text("somebody's")
    assert main(["quickstart", "--profile", "smoke", "--output", str(tmp_path / "out")]) == 2
    assert f"--output={tmp_path / 'out'}" in capsys.readouterr().err
    assert main(["quickstart", "--profile", "smoke", "--output", "/proc/none/out"]) == 2
    assert (tmp_path / "out").read_text() == "somebody's"


def test_what_changes_no_number_may_be_collected(capsys, tmp_path, monkeypatch):
    """What scripts/measure.sh says, among others."""
    from koala.reproduce.cli import main

    monkeypatch.chdir(tmp_path)
    harmless = ["num_gpus=0", "logger=none", "data.workers=1", "--seeds", "2,2"]
    assert main(["koala/table4", "--profile", "smoke", *harmless, "--collect", "--dry-run"]) == 0
    assert "4 runs (0 done" in capsys.readouterr().out  # of four cells with seed 2


def test_paths_may_hold_what_hydra_has_a_meaning_for(capsys, tmp_path):
    from koala.reproduce.cli import main
    from koala.reproduce.plan import typed

    for text in ("a,b", "it's (x=1)", "1", "null", "[a]{b}", "back\\"):
        assert compose(["data=digits", "optim=sgd", "num_gpus=0", typed("output_root", text)]).output_root == text
    assert typed("output_root", "/tmp/out put") == "output_root=/tmp/out put"
    assert main(["quickstart", "--profile", "smoke", "--dry-run", "--output", str(tmp_path / "a,b=(c)")]) == 0
    assert "a,b=(c)" in capsys.readouterr().out


@pytest.fixture
def finished(tmp_path) -> list[str]:
    """Arguments of a command whose runs have records already."""
    from tests.reproduce.test_search import finish

    done = plan(SMOKE[0], extra=[f"output_root={tmp_path}"])
    finish(done, lambda optim, rate: 1.0)
    return [*SMOKE[:3], "--output", str(tmp_path)]


def test_torn_rows_of_another_table_are_in_nobodys_way(finished, capsys, tmp_path):
    from koala.reproduce.cli import main

    torn = tmp_path / "tables/smoke/measured/koala/table4/smoke/128.jsonl"
    torn.parent.mkdir(parents=True)
    torn.write_text("{torn")
    assert main(finished) == 0
    assert "4 of 4 runs done, 0 failed" in capsys.readouterr().out and torn.read_text() == "{torn"


@pytest.mark.extended
def test_report_stands_though_wandb_is_out_of_reach(finished, capsys, monkeypatch):
    from wandb.errors import CommError

    from koala.reproduce.cli import main
    from koala.tables import write

    def unreachable(*_):
        raise CommError("no [route] to host")

    monkeypatch.setattr(write, "log_wandb", unreachable)
    assert main([*finished, "logger=wandb"]) == 0
    said = capsys.readouterr().out
    assert "W&B: CommError: no [route] to host; the tables are in local files only" in said
    assert "tables/smoke/tables/quickstart.md" in said and "4 of 4 runs done, 0 failed" in said


def test_dry_run_lists_runs_blocked_cells_and_cost(capsys, tmp_path, monkeypatch):
    from koala.reproduce import options
    from koala.reproduce.cli import main
    from tests.reproduce.test_search import SPEC
    from tests.tables.synthetic import make_experiment

    monkeypatch.chdir(tmp_path)
    assert main(["koala/table4", "--dry-run", "--seeds", "1,2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("python train.py data=cifar100") == 8  # four batch sizes, two seeds
    assert "batch_size=32 seed=2" in printed
    assert "koala: 1 tables with 0 figures, 4 cells runnable, 0 blocked" in printed
    assert "8 runs (0 done" in printed and "to do: 8 runs, " in printed
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(options, "EXPERIMENTS", make_experiment(tmp_path, SPEC).path.parent)
    assert main(["small", "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "12 runs (0 done" in printed and "to do: 12 runs, " in printed
    assert "small: a search: each chosen rate is then run with the remaining seeds, 4 runs, " in printed
    assert "each widening of the rates takes 4 runs, " in printed
    make_experiment(tmp_path, SPEC.replace(", trial_seeds: 2", ""))
    assert main(["small", "--dry-run"]) == 0
    assert "small: a search: each widening of the rates takes 8 runs, " in " ".join(capsys.readouterr().out.split())
    needs = "needs: [{match: {optim: [sgd, adam]}, reason: nobody wrote it}]\n"
    spec = make_experiment(tmp_path, SPEC.replace("rows:", needs + "rows:"))
    monkeypatch.setattr(options, "EXPERIMENTS", spec.path.parent)
    assert main([spec.name, "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 cells (optim=sgd, optim=adam): nobody wrote it" in printed
    assert "our own: 1 tables with 0 figures, 0 cells runnable, 2 blocked" in printed


@pytest.mark.parametrize("forced", [None, "FORCE_COLOR", "TTY_COMPATIBLE"])
def test_progress_in_a_file_is_a_line_for_each_run_that_ends(tmp_path, monkeypatch, forced):
    if forced:
        monkeypatch.setenv(forced, "1")
    runs = plan("koala/table4", seeds=[1, 2], extra=[f"output_root={tmp_path}"]).runs
    log = tmp_path / "log"
    with log.open("w") as stream:
        progress = RunProgress(runs, terminal.console(stream, soft_wrap=True))
        with progress.bars:
            for run, state in zip(runs[:4], ("done", "running", "failed", "done"), strict=True):
                progress.apply(Event(run, "running"))
                if state != "running":
                    progress.apply(Event(run, state, "why [it] failed" if state == "failed" else ""))
    lines = log.read_text().splitlines()
    assert "\x1b" not in log.read_text() and [line.split("]")[0] for line in lines] == ["[1/8", "[2/8", "[3/8"]
    assert "why [it] failed" in lines[1] and progress.problems == {runs[2].path: "why [it] failed"}


def test_progress_on_a_terminal_has_a_bar_for_all_and_one_for_each_that_runs(tmp_path):
    from rich.console import Console

    runs = plan("koala/table4", seeds=[1, 2], extra=[f"output_root={tmp_path}"]).runs
    console = Console(width=120, force_terminal=True, record=True, file=open(os.devnull, "w"))
    progress = RunProgress(runs, console)
    progress.apply(Event(runs[0], "running"))
    progress.apply(Event(runs[1], "failed", "why"))
    console.print(progress.bars)
    text = console.export_text()
    assert "1/8" in text and "1 failed" in text and "left" in text and text.count("seed1") == 1


def test_sweep_file_makes_valid_commands(root, monkeypatch):
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.setenv("OPTIM", "koala-m")
    sweep = yaml.safe_load((root / "scripts/sweeps/tune.yaml").read_text())
    command = create_sweep_command(sweep["command"])
    drawn = create_sweep_command_args({"args": {"optim.lr": {"value": 3.2e-05}, "seed": {"value": 1}}})
    overrides = [text for text in command if "=" in text] + drawn["args_no_hyphens"]
    cfg = compose(overrides)
    assert (cfg.optim.name, cfg.optim.lr, cfg.data.name) == ("koala-m", 3.2e-05, "digits")
    assert command[:3] == ["${env}", "python", "${program}"] and (root / sweep["program"]).exists()


@pytest.mark.slow
def test_all_tables_smoke(run_door, tmp_path):
    done = run_door(DOOR, "all", "--profile", "smoke", "--output", str(tmp_path), timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
    statuses = [
        row["status"]
        for path in (tmp_path / "tables/smoke/tables").rglob("*.csv")
        for row in csv.DictReader(path.open())
    ]
    assert "not run" not in statuses and set(statuses) <= STATUSES


@pytest.mark.slow
@shares_the_undisturbed
def test_killed_five_times(undisturbed, start_door, run_door, tmp_path):
    import random

    draw, kills = random.Random(1), 0
    while kills < 5 and len(records(tmp_path)) < 4:
        process = start_door(DOOR, *SMOKE, "--output", str(tmp_path))
        time.sleep(draw.uniform(6, 20))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert run_door(DOOR, *SMOKE, "--output", str(tmp_path)).returncode == 0
    assert [row["value"] for row in errors(tmp_path)] == [row["value"] for row in errors(undisturbed[0])]
