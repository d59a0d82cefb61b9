"""Figures of a table's runs: learning curves, time, sensitivity to the rate, standings over tasks, and a file's own."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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

    columns = {_panel(table, entry): column(entry) for entry in table.entries if entry.rows}
    plain = set(columns.values()) == {str(metric.key)} and metric.scale == 1
    plain = plain and metric.below is None and metric.after_seconds is None
    return column, {panel: metric.label if plain else _words(key) for panel, key in columns.items()}


def _words(column: str) -> str:
    """A column of the history in words: "val_top1_error" is "validation top-1 error (%)"."""
    return LABELS.get(column) or column.replace("_", " ")


def _panel(table: Table, entry: Entry) -> str:
    """The title of the panel that the entry's line is in: its values on all axes but the compared one."""
    return " · ".join(table.experiment.labels(table.experiment.rest(entry.key)))


def _lines(table: Table, points: Callable[[Entry], dict | None]) -> Panels:
    """The lines of the compared values, by panel.

    Args:
        points: the fields of a cell's `Line` but its label and style, or None.
    """
    experiment, panels = table.experiment, {}
    used: dict[tuple[str, str], int] = {}
    for entry in table.entries:
        line = points(entry)
        if line is None or not np.isfinite(line["y"]).any():
            continue
        title, optimizer = _panel(table, entry), experiment.optimizer(entry.key)
        variant = used[title, optimizer] = used.get((title, optimizer), -1) + 1
        shape = style(optimizer) | {"linestyle": DASHES[variant % len(DASHES)]}
        [label] = experiment.labels({experiment.compare: entry.key[experiment.compare]})
        panels.setdefault(title, []).append(Line(label, shape, **line))
    return panels


def _bands(columns: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and t interval of each column of runs."""
    low, high = np.array([mean_interval(column) for column in columns], dtype=float).reshape(-1, 2).T
    return {"y": np.array([column.mean() for column in columns]), "low": low, "high": high}


def curve(runs: list[list[dict]], y: str, x: str, log: bool = False) -> dict[str, np.ndarray] | None:
    """Mean and interval of `y` (or its logarithm) at the k-th evaluation of each run, up to the shortest run: None if
    one has no such value at all, for a mean of the others would be of those that went well.

    Evaluations fall on the same epochs in every run of a cell; their wall times differ, so `x` is averaged too.
    """
    series = [[(point[x], point[y]) for point in points if point.get(x) is not None and point.get(y) is not None]
              for points in runs]  # fmt: skip
    length = min(map(len, series), default=0)
    if length == 0:
        return None
    values = np.array([points[:length] for points in series], dtype=float)
    ys = np.log(values[:, :, 1]) if log else values[:, :, 1]
    return {"x": values[:, :, 0].mean(0), **_bands(list(ys.T))}


def histories(table: Table, column: Callable[[Entry], str], x: str, log: bool = False) -> Panels:
    """Learning curves of each cell's `column`."""
    return _lines(table, lambda entry: curve([row["history"] for row in entry.rows], column(entry), x, log))


def _by_cost(table: Table, column: Callable[[Entry], str], cost: str) -> Panels:
    """Learning curves over steps times the metric `cost`, a step's time over the reference's."""

    def points(entry: Entry) -> dict | None:
        line, ratio = curve([row["history"] for row in entry.rows], column(entry), "step"), entry.numbers[cost].value
        return line | {"x": line["x"] * ratio} if line and ratio else None

    return _lines(table, points)


def sensitivity(table: Table) -> Panels:
    """The choosing metric at every rate that was tried; rates with a diverged run have no point."""

    def points(entry: Entry) -> dict | None:
        tried = [trial for trial in entry.trials if trial.value is not None]
        if not tried:
            return None
        x = np.array([next(iter(trial.point.values())) for trial in tried], dtype=float)
        bands = _bands([np.array(trial.values) for trial in tried])
        rings = [(x[at], bands["y"][at]) for at, trial in enumerate(tried) if trial.point == entry.point]
        return {"x": x, **bands, "ring": rings[0] if rings else None}

    return _lines(table, points)


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
    experiment, printed = table.experiment, table.published.points.get(name, [])
    caption = figure.title + (", crosses: published" if printed else "")
    if figure.kind == "curve":
        panels = histories(table, lambda entry: figure.y, figure.x, figure.log)
        panels = {title: [_with_printed(line, table, printed, figure) for line in lines]
                  for title, lines in panels.items()}  # fmt: skip
        label = f"log {_words(figure.y)}" if figure.log else _words(figure.y)
        return Figure(name, figure.title, caption, panels, figure.x, label, log_y=False if figure.log else None)
    lines: dict[tuple[str, str], list[Entry]] = {}
    for entry in table.entries:
        rest = {axis: value for axis, value in entry.key.items() if axis != figure.x}
        if entry.numbers[figure.y].value is not None:
            line = " · ".join(experiment.labels(rest)), experiment.optimizer(entry.key)
            lines.setdefault(line, []).append(entry)
    metric = table.metrics[figure.y]
    drawn = [_over_axis(words or metric.label, optimizer, lines[words, optimizer], figure)
             for words, optimizer in sorted(lines)]  # fmt: skip
    xlabel = experiment.axes[figure.x].label or figure.x
    return Figure(name, figure.title, caption, {"": drawn} if drawn else {}, xlabel, metric.label, log_x=figure.log)


def _over_axis(label: str, optimizer: str, entries: list[Entry], figure: parts.Figure) -> Line:
    """The figure's metric over the values of its axis."""
    points = [(float(entry.key[figure.x]), entry.numbers[figure.y]) for entry in entries]
    points = [(x, number.value, number.low, number.high) for x, number in sorted(points, key=lambda point: point[0])]
    return Line(label, style(optimizer) | {"linestyle": "-"}, *np.array(points, dtype=float).T)


def _with_printed(line: Line, table: Table, printed: list[Key], figure: parts.Figure) -> Line:
    """The line with the paper's points of its compared value."""
    experiment = table.experiment
    axis = experiment.compare
    value = next(value for value in experiment.axes[axis].values if experiment.labels({axis: value}) == [line.label])
    names = experiment.published_key({axis: value})
    points = [(float(point["at"]), float(point["value"]), float(point["plus_minus"])) for point in printed
              if point["x"] == figure.x and names.items() <= {**names, **point}.items()]  # fmt: skip
    if figure.log:
        points = [(at, math.log(value), error / value) for at, value, error in points]
    return replace(line, printed=points)
