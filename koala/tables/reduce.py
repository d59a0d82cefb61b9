"""From the runs of a cell to its numbers: what each run contributes, what failed, and what the paper has beside it."""

import math
import statistics
from dataclasses import dataclass, field

from koala.tables.metric import Metric
from koala.tables.spec import Cell
from koala.tables.stats import sigmas, summarize

BLOCKED, LEFT_OUT, NOT_RUN = "blocked", "left out", "not run"
DIVERGED, NOT_REACHED, NOT_MEASURED, NOT_TOGETHER = "diverged", "not reached", "not measured", "not measured together"
BESIDE = "not timed one run at a time by one command"
BUSY = "the machine had other work: its load stands in the evidence"
IDLE = 0.5  # load average that a machine has for its own upkeep


@dataclass(frozen=True)
class Number:
    """One metric of one cell: what was measured over n runs, what the paper prints, and what sets them apart.

    `samples` has each run's number by seed, infinite for one that failed. `value` is their mean, or median once one
    failed (`statistic`); `low` and `high` bound it (see stats.INTERVALS). `status` says why there is no value.
    `difference` is measured minus published, only where the two answer the same question, and `sigmas` its size in
    standard errors. `tied`: nothing is better beyond noise, and neither is this better than all others.
    """

    samples: dict[int, float] = field(default_factory=dict)
    statistic: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    std: float | None = None
    n: int = 0
    finite: int = 0
    status: str = ""
    published: float | None = None
    published_std: float | None = None
    difference: float | None = None
    sigmas: float | None = None
    marks: tuple[str, ...] = ()
    best: bool = False
    tied: bool = False
    published_best: bool = False


def final(row: dict, key: str) -> float | None:
    """The run's last value of a metric; None when it diverged or never measured it."""
    return None if row["status"] == "diverged" else row["metrics"]["final"].get(key)


def step_ms(row: dict) -> float | None:
    """Median milliseconds of a step, over the run's parts by their steps; None for a record that does not say."""
    parts = [(part["to"] - part["from"], part["step_ms"]) for part in row.get("segments") or () if part["step_ms"]]
    steps = sum(count for count, _ in parts)
    return sum(count * value for count, value in parts) / steps if steps else None


def read_metric(metric: Metric, row: dict) -> float | None:
    """The number that one run contributes; None when it has none."""
    value: float | None
    if metric.record == "step_ms":
        value = step_ms(row)
    elif metric.record is not None:
        value = row
        for part in metric.record.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and metric.per is not None:
            value = value / row[metric.per] if row.get(metric.per) else None
    elif metric.below is not None:
        reached = (point for point in row["history"] if _at_most(point.get(metric.key), metric.below))
        value = next((point[metric.unit] for point in reached), None)
    elif metric.after_seconds is not None:
        inside = [point for point in row["history"] if metric.key in point and point["seconds"] <= metric.after_seconds]
        value = inside[-1][metric.key] if inside else None
    elif metric.at == "best":
        value = (row["metrics"]["best"].get(metric.key) or {}).get("value")
    else:
        value = final(row, metric.key)
    return None if value is None else metric.offset + metric.scale * value


def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


def foreign_load(row: dict) -> float:
    """How much of the machine's load average was not the run's own threads, at most; 0 for a record without."""
    parts = row.get("segments") or ()
    return max((load - part["threads"] * part["ranks"] for part in parts for load in part["load"]), default=0.0)


def together(row: dict) -> str | None:
    """The command that measured the row one run at a time, or None: times of other rows are no measurement."""
    timing = row.get("timing") or {}
    return timing.get("command") if timing.get("jobs") == 1 else None


def in_turn(rows: list[dict]) -> bool:
    """Whether one command measured all of `rows`, one at a time; else their times say what else the machine did, and
    when."""
    commands = set(map(together, rows))
    return len(commands) == 1 and None not in commands


def sample(metric: Metric, row: dict, reference: dict[int, dict]) -> float | None:
    """What one run adds to a cell: its number, infinity if it failed, None if it has none.

    Args:
        reference: for a relative metric, the runs by seed that it is divided by.
    """
    failed = None if metric.better == "neither" else worst(metric)
    if row["status"] == "diverged":
        return failed
    value = read_metric(metric, row)
    if metric.relative is not None and value is not None:
        base = reference.get(row["seed"])
        if base is None or together(row) is None or together(row) != together(base):
            return None
        under = read_metric(metric, base)
        value = value / under if under else None
    return failed if value is None and metric.below is not None else value


def worst(metric: Metric) -> float:
    """What a failed run counts."""
    return -math.inf if metric.better == "higher" else math.inf


def reduce_metric(
    metric: Metric,
    rows: list[dict],
    reference: dict[int, dict],
    cell: Cell,
    printed: dict[str, float],
    printed_seeds: int,
    marks: list[str],
    comparable: bool,
) -> Number:
    """One number of a cell, next to the printed one, which is taken for a mean over `printed_seeds` runs."""
    beside = {"published": printed.get(metric.published), "published_std": printed.get(metric.published_std)}
    found = {row["seed"]: sample(metric, row, reference) for row in rows}
    samples = {seed: value for seed, value in found.items() if value is not None}
    if not samples:
        return Number(status=_why_none(metric, rows, cell), **beside)
    marks = [*marks, f"{len(samples)} of {len(found)} runs have it"] if len(samples) < len(found) else marks
    if metric.timed:
        beneath = [reference[row["seed"]] for row in rows if metric.relative is not None and row["seed"] in reference]
        marks = [*marks, *([BUSY] if max(map(foreign_load, [*rows, *beneath])) > IDLE else [])]
        marks += [] if metric.relative is not None or in_turn(rows) else [BESIDE]
    summary = summarize(list(samples.values()))
    status = ""
    if summary.value is None:
        status = DIVERGED if all(row["status"] == "diverged" for row in rows) else _failed(metric)
    difference = away = None
    if beside["published"] is not None and comparable and summary.value is not None:
        difference = summary.value - beside["published"]
        if summary.statistic == "mean":
            away = sigmas(difference, summary.std, summary.n, beside["published_std"], printed_seeds)
    return Number(
        samples=samples,
        status=status,
        difference=difference,
        sigmas=away,
        marks=tuple(marks),
        **vars(summary),
        **beside,
    )


def _failed(metric: Metric) -> str:
    return NOT_REACHED if metric.below is not None else DIVERGED


def _why_none(metric: Metric, rows: list[dict], cell: Cell) -> str:
    if not rows:
        return BLOCKED if cell.blocked else LEFT_OUT if cell.left_out else NOT_RUN
    if metric.relative is not None:
        return NOT_TOGETHER
    return NOT_REACHED if metric.below is not None else NOT_MEASURED


def mean_or_none(values: list[float | None]) -> float | None:
    """The mean, or None when there is none or a run failed."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
