#!/usr/bin/env python
"""What the study of docs/metric.md says, by the rules that experiments/metric.yaml fixed before its runs.

python scripts/metric_verdict.py [--measured outputs/tables/cpu/measured]
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

from koala.tables.cli import RESULTS, load_tables
from koala.tables.samples import Trial, of_runs
from koala.tables.stats import compare, mean_interval
from koala.tables.table import Entry

METRICS, ALPHA = ("identity", "adam", "muon"), 0.05
TASKS, SEEDS = 7, 5  # of a verdict
HALF_AN_IMAGE = {"digits": 50 / 180, "cifar10": 50 / 5000, "cifar100": 50 / 5000}  # of the validation sets, in %
HALF_A_TESTED_IMAGE = {"digits": 50 / 360}  # no run gets all of CIFAR right
Samples = dict[tuple[str, str], dict[str, dict[int, float]]]  # by setting and optimizer, task, seed


def holm(p: Iterable[float]) -> list[float]:
    """Adjusted p values, in the order of the given ones."""
    p = list(p)
    adjusted, largest = [1.0] * len(p), 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = largest
    return adjusted


def pairs(ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]]) -> tuple[int, int, list[str]]:
    """On how many tasks ours are significantly better, and worse, and a line for each task."""
    tests = [compare(ours[task], theirs[task]) for task in ours]
    adjusted = holm(p for _, p in tests)
    better, worse, lines = 0, 0, []
    for task, (difference, _), p in zip(ours, tests, adjusted, strict=True):
        better += p < ALPHA and difference < 0
        worse += p < ALPHA and difference > 0
        means = (fmean(runs[task].values()) for runs in (ours, theirs))
        lines.append(f"    {task:12} " + " against ".join(f"{mean:8.2f}" for mean in means) + f"   p = {p:.4f}")
    return better, worse, lines


def one_rate(trials: dict[str, list[Trial]]) -> float:
    """The rate with the lowest mean over the tasks of the log of what is validated; those of all tasks are asked."""
    scores: dict[float, list[float]] = {}
    for task, each in trials.items():
        for trial in each:
            [rate] = trial.point.values()
            scores.setdefault(rate, []).append(fmean(_validated(task, row) for row in trial.tried))
    return min((fmean(score), rate) for rate, score in scores.items() if len(score) == len(trials))[1]


def _validated(task: str, row: dict) -> float:
    if row["status"] == "diverged":
        return math.inf
    if task in HALF_AN_IMAGE:
        return math.log(max(row["metrics"]["final"]["val_top1_error"], HALF_AN_IMAGE[task]))
    return math.log(row["metrics"]["best"].get("val_ppl", {"value": math.inf})["value"])  # it was never finite


def geometric(samples: dict[str, dict[int, float]]) -> dict[int, float]:
    """By seed, the geometric mean over the tasks of the first number, infinite where a run failed."""
    seeds = set.intersection(*(set(runs) for runs in samples.values()))
    least = {task: HALF_A_TESTED_IMAGE.get(task, 0.0) for task in samples}
    return {seed: math.exp(fmean(math.log(max(runs[seed], least[task])) for task, runs in samples.items()))
            for seed in sorted(seeds)}  # fmt: skip


def main() -> None:
    """Prints every verdict, and which are not measured in full."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measured", type=Path, default=RESULTS / "measured", help="folder of recorded rows")
    folder = parser.parse_args().measured
    tuned = measured(folder, "cpu") | measured(folder, "cpu-constant") | measured(folder, "cpu-clipping")
    samples = {key: numbers(by_task) for key, by_task in tuned.items()}
    for (setting, optim), by_task in tuned.items():
        if not in_full(samples[setting, optim]):
            continue
        rate = one_rate({task: entry.trials for task, entry in by_task.items()})
        mean = fmean(geometric(tried_at(rate, by_task)).values())
        good, given = sum(map(tolerated, by_task.values())), sum(len(entry.cell.settings) for entry in by_task.values())
        print(f"{setting}, {optim}: {good} of {given} rates within a tenth of the best",
              f"validation loss; one rate {rate:g}, geometric mean of its trials {mean:.2f}")  # fmt: skip
    for setting in ("board", "constant", "clipping"):
        for metric in METRICS:
            ours, theirs = ((setting, f"{metric}-{step}") for step in ("filter", "constant"))
            show(f"{setting}, {metric}", samples.get(ours, {}), samples.get(theirs, {}))
    for metric in METRICS:
        without, cosine = (samples.get(key, {}) for key in
                           (("constant", f"{metric}-filter"), ("board", f"{metric}-constant")))  # fmt: skip
        show(f"filter without a schedule against {metric}'s constant step with the cosine", without, cosine, least=0)
    show_one_rates({key: numbers(by_task) for key, by_task in measured(folder, "cpu-one-rate").items()})


def measured(folder: Path, profile: str) -> dict[tuple[str, str], dict[str, Entry]]:
    """Cells that have runs, by setting and optimizer, and then by task."""
    [table] = load_tables(["metric"], folder, profile)
    cells: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in table.entries:
        setting, task, optim = entry.key.values()
        if entry.rows:
            cells.setdefault((setting, optim), {})[task] = entry
    return cells


def in_full(samples: dict[str, dict[int, float]]) -> bool:
    """Whether every task has all its seeds."""
    return len(samples) == TASKS and all(len(runs) == SEEDS for runs in samples.values())


def numbers(by_task: dict[str, Entry]) -> dict[str, dict[int, float]]:
    """By task, the first number of each seed."""
    return {task: next(iter(entry.numbers.values())).samples for task, entry in by_task.items()}


def tried_at(rate: float, by_task: dict[str, Entry]) -> dict[str, dict[int, float]]:
    """By task, the first number of the first trial at `rate`."""
    found = {}
    for task, entry in by_task.items():
        [trial] = (trial for trial in entry.trials if [*trial.point.values()] == [rate])
        found[task] = of_runs(next(iter(entry.numbers.values())).metric, trial.tried[:1], {})
    return found


def tolerated(entry: Entry) -> int:
    """How many of the rates that were given come within a tenth of the best validation loss of all that were tried."""
    given = [point for point, _ in entry.cell.settings]
    losses = {str(trial.point): trial.value for trial in entry.trials if trial.value is not None}
    return sum(losses.get(str(point), math.inf) <= 1.1 * min(losses.values()) for point in given)


def show_one_rates(samples: Samples) -> None:
    """The geometric means over the tasks at one rate each, and the verdict on each pair."""
    means = {key: geometric(runs) for key, runs in samples.items() if in_full(runs)}
    for (setting, optim), by_seed in means.items():
        values = np.array([*by_seed.values()])
        interval = ", ".join(f"{end:.2f}" for end in mean_interval(values) if end is not None)
        print(f"at one rate, {setting}, {optim}: {values.mean():.2f} [{interval}]")
    tests = {}
    for metric in METRICS:
        ours, theirs = (("board", f"{metric}-{step}") for step in ("filter", "constant"))
        if ours in means and theirs in means:
            tests[metric] = compare(means[ours], means[theirs])
    for (metric, (difference, _)), p in zip(tests.items(), holm(p for _, p in tests.values()), strict=True):
        print(f"one rate, {metric}: {'yes' if p < ALPHA and difference < 0 else 'no'}; p = {p:.4f}")


def show(title: str, ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]], least: int = 3) -> None:
    """The verdict on one pair."""
    if not (in_full(ours) and in_full(theirs)):
        print(f"{title}: not measured in full")
        return
    better, worse, lines = pairs(ours, theirs)
    answer = "yes" if better >= least and worse <= 1 else "no"
    print(f"{title}: {answer}; better on {better}, worse on {worse} of {TASKS} tasks", *lines, sep="\n")


if __name__ == "__main__":
    main()
