"""Spec, measured rows and printed numbers become one table of numbers, whatever it is rendered to later."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from koala.tables.measured import doubts
from koala.tables.published import PublishedTable
from koala.tables.spec import ASSUMED, FULL, PAPER, Cell, Metric, Profile, Scalar, Setting, Spec, override_value

BLOCKED, LEFT_OUT, NOT_RUN = "blocked", "left out", "not run"
ON_ASSUMPTIONS = "rests on a setting that the paper does not say (assumed, see below)"
DIVERGED, NOT_REACHED, NOT_MEASURED = "diverged", "not reached", "not measured"


@dataclass(frozen=True)
class Number:
    """One metric of one cell: what was measured over n runs, what the paper prints, and what sets them apart.

    `std` is the sample standard deviation (n - 1), None for one run. `status` says why there is no mean. `difference`
    is measured minus published, only where the two answer the same question.
    """

    mean: float | None = None
    std: float | None = None
    n: int = 0
    status: str = ""
    published: float | None = None
    published_std: float | None = None
    difference: float | None = None
    marks: tuple[str, ...] = ()
    best: bool = False
    published_best: bool = False


@dataclass
class Entry:
    """One cell of the table with its numbers by metric and the rows behind them."""

    key: dict[str, Scalar]
    numbers: dict[str, Number]
    rows: list[dict]
    evidence: list[int]
    point: dict[str, Scalar]
    tried: list[tuple[dict[str, Scalar], float | None, int]]
    cell: Cell
    settings: list[Setting]


@dataclass
class Table:
    """A built table. `evidence` lists every row behind it; entries refer to it by position, counted from 1."""

    spec: Spec
    profile: Profile
    metrics: tuple[Metric, ...]
    published: PublishedTable | None
    entries: list[Entry]
    evidence: list[dict]

    @property
    def measured(self) -> bool:
        """Whether any run stands behind the table."""
        return bool(self.evidence)

    def entry(self, key: dict[str, Scalar]) -> Entry | None:
        """The cell `key`, or None where the table has a hole."""
        return next((entry for entry in self.entries if entry.key == key), None)


def build(spec: Spec, profile: Profile, rows: Iterable[dict], published: PublishedTable | None) -> Table:
    """The table of `spec` under `profile`, from those of `rows` that were run for that profile."""
    rows = [row for row in rows if row["profile"] == profile.name]
    metrics = spec.metrics_of(profile)
    paper = {str(cell.key): cell for cell in spec.cells(spec.profile(FULL))}
    table = Table(spec, profile, metrics, published, [], [])
    for cell in spec.cells(profile):
        mine = [row for row in rows if row["cell"] == cell.key]
        point, chosen, tried = choose_point(mine, spec.choose)
        chosen.sort(key=lambda row: row["seed"])
        settings = spec.settings(cell.key) if spec.published else []
        marks = cell_marks(chosen, paper[str(cell.key)], settings, spec, profile)
        printed = published.find(spec.published_key(cell.key)) if published else {}
        numbers = {metric.name: reduce_metric(metric, chosen, printed, marks, cell, profile) for metric in metrics}
        first = len(table.evidence) + 1
        table.evidence += chosen
        evidence = list(range(first, first + len(chosen)))
        table.entries.append(Entry(cell.key, numbers, chosen, evidence, point, tried, cell, settings))
    mark_best(table)
    return table


def choose_point(rows: list[dict], metric: str) -> tuple[dict, list[dict], list[tuple[dict, float | None, int]]]:
    """The grid point with the lowest mean of `metric`, its rows, and what every point came to.

    A point with a diverged run stands behind every point without one.
    """
    by_point = lambda row: str(sorted(row["point"].items()))  # noqa: E731
    groups = [list(group) for _, group in groupby(sorted(rows, key=by_point), key=by_point)]
    if not groups:
        return {}, [], []
    if len(groups) == 1:
        return groups[0][0]["point"], groups[0], []
    tried = []
    for group in groups:
        values = [value for row in group if (value := chosen_by(row, metric)) is not None]
        tried.append((group[0]["point"], statistics.fmean(values) if len(values) == len(group) else None, len(group)))
    order = [math.inf if value is None else value for _, value, _ in tried]
    best = order.index(min(order))
    return tried[best][0], groups[best], tried


def chosen_by(row: dict, key: str) -> float | None:
    """The run's value of the metric that chooses among grid points: its best where the run reports its best-validation
    model, else its last; None when it diverged."""
    if row["status"] == "finished" and row["config"].get("select") == "best-val":
        return (row["metrics"]["best"].get(key) or {}).get("value")
    return final(row, key)


def final(row: dict, key: str) -> float | None:
    """The run's last value of a metric; None when it diverged or never measured it."""
    return None if row["status"] == "diverged" else row["metrics"]["final"].get(key)


def read_metric(metric: Metric, row: dict) -> float | None:
    """The number that one run contributes, before averaging; None when it has none."""
    value: float | None
    if metric.record is not None:
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


def reduce_metric(
    metric: Metric, rows: list[dict], printed: dict[str, float], marks: list[str], cell: Cell, profile: Profile
) -> Number:
    """Mean and sample standard deviation over the runs that have the number, next to the printed one."""
    published, published_std = printed.get(metric.published), printed.get(metric.published_std)
    values = [value for row in rows if row["status"] == "finished" and (value := read_metric(metric, row)) is not None]
    if not values:
        return Number(status=_why_none(metric, rows, cell), published=published, published_std=published_std)
    marks = list(marks)
    missing = sum(row["status"] == "finished" for row in rows) - len(values)
    if missing:
        marks.append(
            f"{len(values)} of {len(values) + missing} runs {'reached it' if metric.below is not None else 'have it'}"
        )
    mean = statistics.fmean(values)
    return Number(
        mean=mean,
        std=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
        published=published,
        published_std=published_std,
        difference=mean - published if published is not None and profile.comparable else None,
        marks=tuple(marks),
    )


def _why_none(metric: Metric, rows: list[dict], cell: Cell) -> str:
    if not rows:
        return BLOCKED if cell.blocked else LEFT_OUT if cell.left_out else NOT_RUN
    if all(row["status"] == "diverged" for row in rows):
        return DIVERGED
    return NOT_REACHED if metric.below is not None else NOT_MEASURED


def cell_marks(rows: list[dict], paper: Cell, settings: list[Setting], spec: Spec, profile: Profile) -> list[str]:
    """What sets the measured runs apart from the paper's (or, for a table of our own, from its full profile)."""
    if not rows:
        return []
    marks = [ON_ASSUMPTIONS] if any(setting.source == ASSUMED for setting in settings) else []
    whose = "the paper's" if spec.published else "the full"
    diverged = sum(row["status"] == "diverged" for row in rows)
    if diverged:
        marks.append(f"{diverged} of {len(rows)} runs diverged")
    if profile.comparable:
        marks += _deviations(rows, paper, settings, len(spec.profile(FULL).seeds))
    else:
        marks.append(f"{profile.name} profile, not {whose} setting")
    marks += [f"{doubt} behind a run" for row in rows for doubt in doubts(row)]
    return list(dict.fromkeys(marks))


def _deviations(rows: list[dict], full: Cell, settings: list[Setting], seeds: int) -> list[str]:
    """Where the runs differ from the full profile, and whose word that is: the paper's, its code's, or ours."""
    said = {setting.key: setting.source for setting in settings}
    by = lambda key: said.get(key, ASSUMED if settings else FULL)  # noqa: E731
    overrides = full.settings[0][1]
    epochs, precision = override_value(overrides, "epochs"), override_value(overrides, "precision") or "fp32"
    marks = [f"n = {len(rows)} ({by('seeds')}: {seeds})"] if len(rows) != seeds else []
    for row in rows:
        if row["status"] == "finished" and epochs and not math.isclose(row["epochs"], float(epochs), rel_tol=1e-6):
            # The epochs of an axis are a column of the printed table itself.
            marks.append(f"{row['epochs']:.4g} epochs ({PAPER if 'epochs' in row['cell'] else by('epochs')}: {epochs})")
        if row["precision"] != precision:
            marks.append(f"{row['precision']} ({by('precision')}: {precision})")
    return marks


def mark_best(table: Table) -> None:
    """Sets `best` on the best mean (and `published_best` on the best printed value) among the cells that differ only in
    the compared axis."""
    axis = table.spec.compare
    rest = lambda entry: str({name: value for name, value in entry.key.items() if name != axis})  # noqa: E731
    for _, group in groupby(sorted(table.entries, key=rest), key=rest):
        entries = list(group)
        for metric in table.metrics:
            if metric.better == "neither":
                continue
            pick = min if metric.better == "lower" else max
            numbers = [entry.numbers[metric.name] for entry in entries]
            means = [number.mean for number in numbers if number.mean is not None]
            printed = [number.published for number in numbers if number.published is not None]
            for entry, number in zip(entries, numbers, strict=True):
                best = len(means) > 1 and number.mean == pick(means)
                published_best = len(printed) > 1 and number.published == pick(printed)
                fields = {**number.__dict__, "best": best, "published_best": published_best}
                entry.numbers[metric.name] = Number(**fields)
