"""Figures of a table's runs: learning curves, time, sensitivity to the rate, standings over tasks, and a file's own."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from koala.metrics import LABELS
from koala.tables import parts, standings
from koala.tables.parts import Key, Metric
from koala.tables.plots import DASHES, Figure, Line, plot, style
from koala.tables.samples import foreign_load, in_turn
from koala.tables.stats import mean_interval
from koala.tables.table import BUSY, IDLE, Entry, Table

BAND = "mean and 95 % t interval over the seeds"
Panels = dict[str, list[Line]]
Drawn = dict[str, tuple[str, dict[str, Path]]]  # caption and files by panel, by the figure's name


def draw(table: Table, folder: Path, kind: str = "svg") -> Drawn:
    """Draws what the runs allow below `folder`, a file for each panel (svg or png)."""
    drawn = {}
    for figure in figures(table):
        files = {panel: folder / name for panel, name in names(table, figure, kind).items()}
        for panel, path in files.items():
            plot(figure, panel, path)
        drawn[figure.name] = (figure.caption, files)
    return drawn


def names(table: Table, figure: Figure, kind: str = "svg") -> dict[str, str]:
    """The file of each panel: `<table>-<figure>-<panel>.svg`, or `<table>-<figure>.svg` of a single one."""
    several = len(figure.panels) > 1
    words = {panel: re.findall(r"\w+", panel.lower()) if several else [] for panel in figure.panels}
    return {panel: "-".join((table.name, figure.name, *parts)) + f".{kind}" for panel, parts in words.items()}


def figures(table: Table) -> list[Figure]:
    """Every figure that the table's runs allow."""
    return [figure for figure in _figures(table) if figure.panels]


def _figures(table: Table) -> Iterator[Figure]:
    experiment, title = table.experiment, table.experiment.title
    timed = table.profile.timed and in_turn(table.rows)
    if metric := next((metric for metric in table.metrics.values() if metric.key is not None), None):
        column, labels = _curve_of(table, metric)
        label = " or ".join(sorted(set(labels.values())))
        yield Figure("curves", title, f"{label} by step, {BAND}", histories(table, column, "step"), "step", labels)
        if timed:
            caption = f"{label} by training time, {BAND}; runs one at a time, in turn over the optimizers"
            caption += f"; {BUSY}" if any(foreign_load(row) > IDLE for row in table.rows) else ""
            yield Figure("time", title, caption, histories(table, column, "seconds"), "seconds of training", labels)
        elif cost := standings.cost(table):
            [of] = experiment.labels({experiment.compare: table.metrics[cost].relative})
            caption = (
                f"{label} by training time, {BAND}; the time is the number of steps times a step's time over {of}'s"
            )
            yield Figure("time", title, caption, _by_cost(table, column, cost), f"time, in steps of {of}", labels)
    if tuned := [entry for entry in table.entries if entry.trials]:
        choose, rate = _words(experiment.choose), next(iter(tuned[0].point))
        caption = f"{choose} by learning rate, {BAND}; ringed: chosen"
        yield Figure("rates", title, caption, sensitivity(table), rate, choose, log_x=True)
    if tasks := standings.comparable(table):
        caption, lines = f"Performance profiles over {len(tasks)} tasks", profiles(tasks)
        wide = lines[0].x[-1] > 4  # else a logarithmic axis would have no tick but 1
        xlabel, ylabel = "factor of the best on the task", "share of the tasks"
        yield Figure("profiles", caption, caption, {"": lines}, xlabel, ylabel, log_x=wide)
    for name, figure in experiment.figures.items():
        if timed or figure.x != "seconds":
            yield _described(table, name, figure)


def _curve_of(table: Table, metric: Metric) -> tuple[Callable[[Entry], str], dict[str, str]]:
    """The history's column for the table's main metric, by cell, and its name, by panel."""

    def column(entry: Entry) -> str:
        wanted = metric.of(entry.key).key
        seen = any(wanted in point for row in entry.rows for point in row["history"])
        return wanted if seen else wanted.replace("test_", "val_")  # a test set that is used once has no curve

    columns = {entry.task: column(entry) for entry in table.entries if entry.rows}
    plain = set(columns.values()) == {str(metric.key)} and metric.scale == 1
    plain = plain and metric.below is None and metric.after_seconds is None
    return column, {panel: metric.label if plain else _words(key) for panel, key in columns.items()}


def _words(column: str) -> str:
    """A column of the history in words: "val_top1_error" is "validation top-1 error (%)"."""
    return LABELS.get(column) or column.replace("_", " ")


def _lines(cells: Iterable[tuple[Entry, dict | None]]) -> Panels:
    """The lines of the compared values, by panel.

    Args:
        cells: each with the fields of its `Line` but label and style, or None.
    """
    panels: Panels = {}
    used: Counter[tuple[str, str]] = Counter()
    for entry, line in cells:
        if line is not None and np.isfinite(line["y"]).any():
            variant = used[entry.task, entry.optimizer]
            used[entry.task, entry.optimizer] += 1
            shape = style(entry.optimizer) | {"linestyle": DASHES[variant % len(DASHES)]}
            panels.setdefault(entry.task, []).append(Line(entry.label, shape, **line))
    return panels


def _bands(columns: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and t interval of each column of runs."""
    low, high = np.array([mean_interval(column) for column in columns], dtype=float).reshape(-1, 2).T
    return {"y": np.array([column.mean() for column in columns]), "low": low, "high": high}


def curve(runs: list[dict], y: str, x: str, log: bool = False) -> dict[str, np.ndarray] | None:
    """Mean and interval of `y` (or its logarithm) at the k-th evaluation of each run, up to the shortest run: None if
    one has no such value at all, for a mean of the others would be of those that went well.

    Evaluations fall on the same epochs in every run of a cell; their wall times differ, so `x` is averaged too.
    """
    series = [[(point[x], point[y]) for point in run["history"] if None not in (point.get(x), point.get(y))]
              for run in runs]  # fmt: skip
    length = min(map(len, series), default=0)
    if length == 0:
        return None
    values = np.array([points[:length] for points in series], dtype=float)
    ys = np.log(values[:, :, 1]) if log else values[:, :, 1]
    return {"x": values[:, :, 0].mean(0), **_bands(list(ys.T))}


def histories(table: Table, column: Callable[[Entry], str], x: str) -> Panels:
    """Learning curves of each cell's `column`."""
    return _lines((entry, curve(entry.rows, column(entry), x)) for entry in table.entries)


def _by_cost(table: Table, column: Callable[[Entry], str], cost: str) -> Panels:
    """Learning curves over steps times the metric `cost`, a step's time over the reference's."""
    curves = ((entry, curve(entry.rows, column(entry), "step"), entry.numbers[cost].value) for entry in table.entries)
    return _lines((entry, line | {"x": line["x"] * ratio}) for entry, line, ratio in curves if line and ratio)


def sensitivity(table: Table) -> Panels:
    """The choosing metric at every rate that was tried; rates with a diverged run have no point."""
    return _lines((entry, _trials(entry)) for entry in table.entries)


def _trials(entry: Entry) -> dict | None:
    tried = [trial for trial in entry.trials if trial.value is not None]
    if not tried:
        return None
    x = np.array([next(iter(trial.point.values())) for trial in tried], dtype=float)
    bands = _bands([np.array(trial.values) for trial in tried])
    rings = [(x[at], bands["y"][at]) for at, trial in enumerate(tried) if trial.point == entry.point]
    return {"x": x, **bands, "ring": rings[0] if rings else None}


def profiles(tasks: list[standings.Task]) -> list[Line]:
    """For each optimizer, the share of its tasks on which its number is within a factor tau of the best one."""
    names = standings.labels(tasks)
    factors = {name: [task.factor(name) for task in tasks if name in task.numbers] for name in names}
    largest = max((factor for each in factors.values() for factor in each if math.isfinite(factor)), default=1.0)
    taus = np.geomspace(1.0, max(1.1, largest * 1.1), 60)
    share = lambda each: (np.array(each)[:, None] <= taus).mean(0)  # noqa: E731
    return [Line(names[name], style(name) | {"drawstyle": "steps-post"}, taus, share(each))
            for name, each in factors.items() if each]  # fmt: skip


def _described(table: Table, name: str, figure: parts.Figure) -> Figure:
    """A figure that the experiment file describes."""
    printed = table.published.points.get(name, [])
    caption = figure.title + (", crosses: published" if printed else "")
    if figure.kind == "sensitivity":
        return _over_axis(table, name, figure, caption)
    curves = ((entry, curve(entry.rows, figure.y, figure.x, figure.log)) for entry in table.entries)
    panels = _lines((entry, line | {"printed": _printed(table, entry, printed, figure)})
                    for entry, line in curves if line)  # fmt: skip
    label = f"log {_words(figure.y)}" if figure.log else _words(figure.y)
    return Figure(name, figure.title, caption, panels, figure.x, label, log_y=False if figure.log else None)


def _printed(table: Table, entry: Entry, printed: list[Key], figure: parts.Figure) -> list[tuple[float, float, float]]:
    """Those of the paper's points that are of the cell's compared value."""
    compare = table.experiment.compare
    names = table.experiment.published_key({compare: entry.key[compare]})
    points = [(float(point["at"]), float(point["value"]), float(point["plus_minus"])) for point in printed
              if point["x"] == figure.x and names.items() <= {**names, **point}.items()]  # fmt: skip
    return [(at, math.log(value), error / value) for at, value, error in points] if figure.log else points


def _over_axis(table: Table, name: str, figure: parts.Figure, caption: str) -> Figure:
    """A metric over the values of an axis, a line for each of the others' values."""
    experiment, metric = table.experiment, table.metrics[figure.y]
    lines: dict[tuple[str, str], list[tuple]] = {}
    for entry in table.entries:
        number = entry.numbers[figure.y]
        rest = {axis: value for axis, value in entry.key.items() if axis != figure.x}
        if number.value is not None:
            line = lines.setdefault((" · ".join(experiment.labels(rest)) or metric.label, entry.optimizer), [])
            line.append((float(entry.key[figure.x]), number.value, number.low, number.high))
    drawn = [Line(label, style(optimizer), *np.array(sorted(points), dtype=float).T)
             for (label, optimizer), points in sorted(lines.items())]  # fmt: skip
    xlabel = experiment.axes[figure.x].label or figure.x
    return Figure(name, figure.title, caption, {"": drawn} if drawn else {}, xlabel, metric.label, log_x=figure.log)
