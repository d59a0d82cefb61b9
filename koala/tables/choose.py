"""From the runs of a cell to its samples: which point of its grid is shown, and what each run adds."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from koala.tables.parts import Key, Metric


@dataclass(frozen=True)
class Trial:
    """One point of a cell's grid: the choosing metric over the runs that `tried` it for the choice, its mean (None: one
    failed), and all rows there are."""

    point: Key
    values: list[float | None]
    value: float | None
    tried: list[dict]
    rows: list[dict]


def choose(rows: Iterable[dict], metric: str) -> tuple[Key, list[dict], list[Trial]]:
    """The grid point with the lowest mean of `metric`, its rows by seed, and the trial of every point.

    A point with a diverged run stands behind every one without. Runs from before the cell had a grid are no trials:
    they have no point.
    """
    rows = list(rows)
    rows = [row for row in rows if row["point"]] or rows
    by_point = lambda row: str(sorted(row["point"].items()))  # noqa: E731
    groups = [list(group) for _, group in groupby(sorted(rows, key=by_point), key=by_point)]
    if not groups:
        return {}, [], []
    shared = set.intersection(*({row["seed"] for row in group} for group in groups))
    trials = []
    for group in groups:
        tried = [row for row in group if row["seed"] in shared]
        values = [_chosen_by(row, metric) for row in tried] or [None]  # on other seeds nothing is compared
        trials.append(Trial(group[0]["point"], values, mean_or_none(values), tried, group))
    best = min(trials, key=lambda trial: math.inf if trial.value is None else trial.value)
    trials.sort(key=lambda trial: [value for value in trial.point.values() if isinstance(value, (int, float))])
    return best.point, sorted(best.rows, key=lambda row: row["seed"]), trials if len(trials) > 1 else []


def at_edge(trials: list[Trial], point: Key) -> bool:
    """Whether `point` is the smallest or the largest of its grid, so that a wider one may do better."""
    return bool(trials) and point in (trials[0].point, trials[-1].point)


def mean_or_none(values: list[float | None]) -> float | None:
    """The mean, or None when there is none or a run failed."""
    return statistics.fmean(values) if values and None not in values else None


def _chosen_by(row: dict, key: str) -> float | None:
    """The run's value of the metric that chooses: its best where the run reports its best-validation model, else its
    last; None when it diverged."""
    if row["status"] == "diverged":
        return None
    if row["config"].get("select") == "best-val":
        return (row["metrics"]["best"].get(key) or {}).get("value")
    return row["metrics"]["final"].get(key)


def samples(metric: Metric, rows: list[dict], reference: dict[int, dict]) -> dict[int, float]:
    """What each run adds to a cell, by seed: its number, or infinity if it failed; not those that have none.

    Args:
        reference: for a relative metric, the runs by seed that it is divided by.
    """
    values = {row["seed"]: _sample(metric, row, reference.get(row["seed"])) for row in rows}
    return {seed: value for seed, value in values.items() if value is not None}


def _sample(metric: Metric, row: dict, base: dict | None) -> float | None:
    failed = None if metric.better == "neither" else metric.worst
    if row["status"] == "diverged":
        return failed
    value = reading(metric, row)
    if metric.relative is not None and value is not None:
        if base is None or together(row) is None or together(row) != together(base):
            return None
        under = reading(metric, base)
        value = value / under if under else None
    return failed if value is None and metric.below is not None else value


def reading(metric: Metric, row: dict) -> float | None:
    """The number that a finished run contributes; None when it has none."""
    value: float | None
    points = [(point, point[metric.key]) for point in row["history"] if point.get(metric.key) is not None]
    if metric.record == "step_ms":
        value = step_ms(row)
    elif metric.record is not None:
        value = _at(row, metric.record)
        if value is not None and metric.per is not None:
            value = value / row[metric.per] if row.get(metric.per) else None
    elif metric.below is not None:
        value = next((point[metric.unit] for point, reached in points if reached <= metric.below), None)
    elif metric.after_seconds is not None:
        value = next((reached for point, reached in reversed(points) if point["seconds"] <= metric.after_seconds), None)
    elif metric.at == "best":
        value = (row["metrics"]["best"].get(metric.key) or {}).get("value")
    else:
        value = row["metrics"]["final"].get(metric.key)
    return None if value is None else metric.offset + metric.scale * value


def _at(row: dict, path: str) -> float | None:
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def step_ms(row: dict) -> float | None:
    """Median milliseconds of a step, over the run's parts by their steps; None for a record that has none."""
    parts = [(part["to"] - part["from"], part["step_ms"]) for part in row.get("segments") or () if part["step_ms"]]
    steps = sum(count for count, _ in parts)
    return sum(count * value for count, value in parts) / steps if steps else None


def foreign_load(row: dict) -> float:
    """How much of the machine's load average was not the run's own threads, at most; 0 for a record without."""
    parts = row.get("segments") or ()
    return max((load - part["threads"] * part["ranks"] for part in parts for load in part["load"]), default=0.0)


def together(row: dict) -> str | None:
    """The command that measured the row one run at a time, or None: times of other rows are no measurement."""
    timing = row.get("timing") or {}
    return timing.get("command") if timing.get("jobs") == 1 else None


def in_turn(rows: list[dict]) -> bool:
    """Whether one command measured all of `rows`, one at a time; else their times depend on what the machine did."""
    commands = set(map(together, rows))
    return len(commands) == 1 and None not in commands


def quantity(point: dict, name: str) -> float | None:
    """A quantity of a history's row: one of its columns, or what a filter estimates, under one name for all filters.

    `noise` is R, `covariance` P (what is left of it after the update), and `rate` lr P L / R: SGD's learning rate for
    the same step, while P |g|² is small beside R.
    """
    noise, covariance = point.get("filter_R"), point.get("filter_P11", point.get("filter_s"))
    if name in ("noise", "covariance"):
        return noise if name == "noise" else covariance
    if name != "rate":
        return point.get(name)
    loss = point.get("train_loss")
    return None if covariance is None or not noise or loss is None else point["lr"] * covariance / noise * loss
