"""What a person sees of a command: what it would do, and how far it is."""

import os
import re

import pytest
from rich.console import Console

from koala import terminal
from koala.reproduce import options
from koala.reproduce.cli import main
from koala.reproduce.plan import Plan
from koala.reproduce.progress import Event, RunProgress
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import load_experiment
from tests.reproduce.test_search import SPEC
from tests.tables.synthetic import make_experiment


@pytest.fixture
def runs(tmp_path):
    """Eight runs: four batch sizes, two seeds."""
    spec = load_experiment(EXPERIMENTS, "koala/table4")
    return Plan([spec], "smoke", seeds=[1, 2], extra=[f"output_root={tmp_path}"]).runs


def test_dry_run_lists_runs_and_cost(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["koala/table4", "--dry-run", "--seeds", "1,2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("python train.py data=cifar100") == 8 and "batch_size=32 seed=2" in printed
    assert printed.count(" FLOP") == 4 + 1  # of each cell, and in all
    assert not any(tmp_path.iterdir())


NEEDS = "needs: [{match: {optim: [sgd, adam]}, reason: nobody wrote it}]\nrows:"


@pytest.mark.parametrize(
    "old, new, runs, added",
    [
        (", trial_seeds: 2", ", trial_seeds: 2", 12, [4, 4]),  # the chosen rates with the remaining seeds; a widening
        (", trial_seeds: 2", "", 24, [8]),
        ("rows:", NEEDS, 0, []),
    ],
)
def test_dry_run_tells_what_a_search_adds_and_what_is_blocked(capsys, tmp_path, monkeypatch, old, new, runs, added):
    spec = make_experiment(tmp_path, SPEC.replace(old, new))
    monkeypatch.setattr(options, "EXPERIMENTS", spec.path.parent)
    assert main(["small", "--dry-run", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("python train.py") == runs
    search = [line for line in printed.splitlines() if line.startswith("small:")]
    assert [int(count) for line in search for count in re.findall(r"(\d+) runs", line)] == added
    assert ("nobody wrote it" in printed) == (new == NEEDS) and ("optim=sgd, optim=adam" in printed) == (new == NEEDS)


@pytest.mark.parametrize("forced", [None, "FORCE_COLOR", "TTY_COMPATIBLE"])
def test_progress_in_a_file_is_a_line_for_each_run_that_ends(tmp_path, monkeypatch, runs, forced):
    if forced:
        monkeypatch.setenv(forced, "1")
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


def test_progress_on_a_terminal_has_a_bar_for_all_and_one_for_each_that_runs(runs):
    console = Console(width=120, force_terminal=True, record=True, file=open(os.devnull, "w"))
    progress = RunProgress(runs, console)
    progress.apply(Event(runs[0], "running"))
    progress.apply(Event(runs[1], "failed", "why"))
    console.print(progress.bars)
    text = console.export_text()
    assert "1/8" in text and text.count("seed1") == 1
