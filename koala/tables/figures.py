"""Pictures of a table's runs: learning curves, time, how much the rate matters, and what the filters estimate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from koala.tables.build import Entry, Table
from koala.tables.metric import Metric
from koala.tables.plots import LARGEST, Frame, Line, plot
from koala.tables.published import PrintedPoint
from koala.tables.reduce import BUSY, IDLE, foreign_load, in_turn, mean_or_none, sample
from koala.tables.spec import Drawing
from koala.tables.stats import mean_interval
from koala.tables.style import DASHES, style

# What the filters estimate, by the name of its figure. P is what is left after the update, so lr P / R is the
# gain of the largest gradient in it, lr P_before / (P_before |h|^2 + R): times the innovation and h it is the step.
INTERNALS = {
    "noise": "measurement noise R",
    "covariance": "covariance P of the weights",
    "gain": "gain, lr P / R",
}
Panels = dict[str, list[Line]]


@dataclass(frozen=True)
class Figure:
    """A drawn picture: what it shows and its file. Internals are for the page alone."""

    name: str
    caption: str
    path: Path
    panels: int
    internal: bool


def draw(table: Table, folder: Path, kind: str = "svg", internals: Path | None = None) -> list[Figure]:
    """Draws what the runs allow, as `<folder>/<table>-<what>.<kind>` (svg or png); no runs, no figures.

    Args:
        internals: where pictures of the filters' internals go; none are drawn without.
    """
    figures = []
    for name, caption, frame, panels in pictures(table):
        internal = name in INTERNALS
        if not panels or (internal and internals is None):
            continue
        path = Path(internals if internal else folder) / f"{table.spec.name}-{name}.{kind}"
        drawn = plot(panels, frame, path)
        more = f" (the first {LARGEST} of {len(panels)} panels)" if len(panels) > LARGEST else ""
        figures.append(Figure(f"{table.spec.name}-{name}", caption + more, path, drawn, internal))
    return figures


def pictures(table: Table) -> Iterator[tuple[str, str, Frame, Panels]]:
    """Name, caption, axes and lines of every picture the table can have."""
    title = table.spec.title if table.profile.name == "full" else f"{table.spec.title} ({table.profile.name} profile)"
    band = "mean and 95 % t interval over the seeds"
    timed = table.profile.timed and in_turn(table.evidence)
    metric = next((metric for metric in table.metrics if metric.key is not None), None)
    if metric is not None:
        key, labels = _curve_of(table, metric)
        label = " or ".join(sorted(set(labels.values())))
        by_epoch = Frame(title, "epoch", labels)
        yield "curves", f"{title}: {label} by epoch, {band}", by_epoch, histories(table, key, "epoch")
        if timed:
            by_time = Frame(title, "seconds of training", labels)
            caption = f"{title}: {label} by training time, {band}; runs one at a time, in turn over the optimizers"
            caption += f"; {BUSY}" if any(foreign_load(row) > IDLE for row in table.evidence) else ""
            yield "time", caption, by_time, histories(table, key, "seconds")
    if any(entry.trials for entry in table.entries):
        choose = _words(table.spec.choose)
        rate = next(iter(next(entry for entry in table.entries if entry.trials).point))
        frame = Frame(title, rate, choose, log_x=True)
        yield "rates", f"{title}: {choose} by rate, {band}; ringed: chosen", frame, sensitivity(table)
        shown = table.metrics[0]
        frame = Frame(title, "best of k trials", shown.label)
        caption = f"{title}: {shown.label} that k trials lead to, on average over which k of all; chosen on {choose}"
        caption += "; no point where a choice of k may fail"
        yield "trials", caption, frame, best_of_k(table, shown)
    for drawing in table.spec.figures if timed else (one for one in table.spec.figures if one.x != "seconds"):
        yield drawing.name, *_own(table, drawing)
    for name, label in INTERNALS.items():
        yield name, f"{title}: the filter's {label}", Frame(title, "epoch", label), histories(table, name, "epoch")


def _curve_of(table: Table, metric: Metric) -> tuple[Callable[[Entry], str], dict[str, str]]:
    """The history's column for the table's main metric, by cell, and its name, by panel."""

    def key(entry: Entry) -> str:
        wanted = metric.of(entry.key).key
        seen = any(wanted in row for run in entry.rows for row in run["history"])
        return (
            wanted if seen else wanted.replace("test_", "val_")
        )  # a test set looked at once, at the end, has no curve

    keys = {_panel(table, entry): key(entry) for entry in table.entries if entry.rows}
    plain = {metric.key}.issuperset(keys.values()) and metric.below is None and metric.after_seconds is None
    plain = plain and metric.scale == 1
    return key, {panel: metric.label if plain else _words(column) for panel, column in keys.items()}


def _words(key: str) -> str:
    """A column of the history in words: "val_top1_error" is "validation top-1 error (%)"."""
    for short, word in (("val_", "validation_"), ("top1", "top-1"), ("top5", "top-5"), ("ppl", "perplexity"),
                        ("error", "error (%)")):  # fmt: skip
        key = key.replace(short, word)
    return key.replace("_", " ")


def _panel(table: Table, entry: Entry) -> str:
    """The title of the panel that the entry's line is in: its values on all axes but the compared one."""
    return " · ".join(table.spec.axis(name).value(value).label for name, value in table.spec.rest(entry.key).items())


def _lines(table: Table, of) -> Panels:
    """One panel for each combination of the other axes, one line for each value of the compared one.

    Args:
        of: entry -> (x, y, low, high) as arrays and further fields of `Line`, or None.
    """
    panels: Panels = {}
    used: dict[tuple[str, str], int] = {}
    for entry in table.entries:
        found = of(entry)
        if found is None or not np.isfinite(found["y"]).any():  # no axis has a place for it
            continue
        title = _panel(table, entry)
        optimizer = table.spec.optimizer(entry.key)
        variant = used[title, optimizer] = used.get((title, optimizer), -1) + 1
        look = style(optimizer) | {"linestyle": DASHES[variant % len(DASHES)]}
        label = table.spec.axis(table.spec.compare).value(entry.key[table.spec.compare]).label
        panels.setdefault(title, []).append(Line(label, look, **found))
    return panels


def _bands(columns: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and t interval of each column of runs."""
    ends = [[math.nan if end is None else end for end in mean_interval(column)] for column in columns]
    low, high = np.array(ends, dtype=float).reshape(-1, 2).T
    return {"y": np.array([column.mean() for column in columns]), "low": low, "high": high}


def reading(row: dict, quantity: str) -> float | None:
    """A quantity of a history row: one of its own columns, or one of INTERNALS."""
    if quantity not in INTERNALS:
        return row.get(quantity)
    noise, covariance = row.get("filter_R"), row.get("filter_P11", row.get("filter_s"))
    if quantity == "noise":
        return noise
    if covariance is None or quantity == "covariance":
        return covariance
    return row["lr"] * covariance / noise if noise else None


def curve(runs: list[list[dict]], y: str, x: str, log: bool = False) -> dict[str, np.ndarray] | None:
    """Mean and interval of `y` (or its logarithm) at the k-th evaluation of each run, up to the shortest run: None if
    one has no such value at all, for a mean of the others would be of those that went well.

    Evaluations fall on the same epochs in every run of a cell; their wall times differ, so `x` is averaged too.
    """
    series = [
        [(row[x], value) for row in rows if row.get(x) is not None and (value := reading(row, y)) is not None]
        for rows in runs
    ]
    length = min(map(len, series), default=0)
    if length == 0:
        return None
    values = np.array([points[:length] for points in series], dtype=float)
    ys = np.log(values[:, :, 1]) if log else values[:, :, 1]
    return {"x": values[:, :, 0].mean(0), **_bands(list(ys.T))}


def histories(table: Table, y: str | Callable[[Entry], str], x: str, log: bool = False) -> Panels:
    """Learning curves of `y`, which may be another column for each cell."""
    column = y if callable(y) else lambda entry: y
    return _lines(table, lambda entry: curve([row["history"] for row in entry.rows], column(entry), x, log))


def sensitivity(table: Table) -> Panels:
    """The choosing metric at every rate that was tried; rates with a diverged run have no point."""

    def of(entry: Entry):
        tried = [trial for trial in entry.trials if trial.value is not None]
        if not tried:
            return None
        x = np.array([next(iter(trial.point.values())) for trial in tried], dtype=float)
        bands = _bands([np.array(trial.values) for trial in tried])
        at = next((index for index, trial in enumerate(tried) if trial.point == entry.point), None)
        ring = None if at is None else (x[at], bands["y"][at])
        return {"x": x, **bands, "ring": ring}

    return _lines(table, of)


def best_of_k(table: Table, metric: Metric) -> Panels:
    """Expected `metric` of the trial that validation would choose among k of all trials, drawn without replacement.

    A trial that diverged is chosen after all others; where k trials may all have diverged there is no point.
    """

    def of(entry: Entry):
        tried = [
            (math.inf if trial.value is None else trial.value,
             mean_or_none([sample(metric.of(entry.key), row, {}) for row in trial.tried]))
            for trial in entry.trials
        ]  # fmt: skip
        ranked = [shown for _, shown in sorted(tried, key=lambda trial: trial[0])]
        n = len(ranked)
        if n < 2 or None in ranked or math.isinf(min(ranked, key=abs)):
            return None
        # Of k trials the i-th best of all n is the best in C(n - i, k - 1) of C(n, k) cases.
        y = [sum(cases * shown for i, shown in enumerate(ranked, 1) if (cases := math.comb(n - i, k - 1)))
             / math.comb(n, k) for k in range(1, n + 1)]  # fmt: skip
        y = np.where(np.isfinite(y), y, math.nan)
        none = np.full(n, math.nan)
        return {"x": np.arange(1.0, n + 1), "y": y, "low": none, "high": none}

    return _lines(table, of)


def _own(table: Table, drawing: Drawing) -> tuple[str, Frame, Panels]:
    """A figure that the experiment file asks for."""
    printed = table.printed.get(drawing.name, ())
    said = ", crosses: published" if printed else ""
    if drawing.kind == "curve":
        label = f"log {_words(drawing.y)}" if drawing.log else _words(drawing.y)
        panels = histories(table, drawing.y, drawing.x, drawing.log)
        panels = {
            title: [_with_printed(line, table, printed, drawing) for line in lines] for title, lines in panels.items()
        }
        return (
            f"{drawing.title}{said}",
            Frame(drawing.title, drawing.x, label, log_y=False if drawing.log else None),
            panels,
        )
    metric = next(metric for metric in table.metrics if metric.name == drawing.y)
    panels: Panels = {}
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in table.entries:
        if entry.numbers[drawing.y].value is not None:
            rest = {name: value for name, value in entry.key.items() if name != drawing.x}
            words = " · ".join(table.spec.axis(name).value(value).label for name, value in rest.items())
            groups.setdefault((words, table.spec.optimizer(entry.key)), []).append(entry)
    for (words, optimizer), entries in groups.items():
        entries.sort(key=lambda entry: float(entry.key[drawing.x]))
        numbers = [entry.numbers[drawing.y] for entry in entries]
        arrays = {name: np.array([getattr(number, field) for number in numbers], dtype=float)
                  for name, field in (("y", "value"), ("low", "low"), ("high", "high"))}  # fmt: skip
        x = np.array([float(entry.key[drawing.x]) for entry in entries])
        panels.setdefault("", []).append(
            Line(words or metric.label, style(optimizer) | {"linestyle": "-"}, x, **arrays)
        )
    label = table.spec.axis(drawing.x).label
    return f"{drawing.title}{said}", Frame(drawing.title, label, metric.label, log_x=drawing.log), panels


def _with_printed(line: Line, table: Table, printed: tuple[PrintedPoint, ...], drawing: Drawing) -> Line:
    """The line with the paper's points of its compared value."""
    axis = table.spec.axis(table.spec.compare)
    value = next(value for value in axis.values if value.label == line.label)
    mine = [point for point in printed if point.x == drawing.x and all(
        point.names.get(name, wanted) == wanted for name, wanted in value.published.items())]  # fmt: skip
    if drawing.log:
        points = [(point.at, math.log(point.value), point.plus_minus / point.value) for point in mine]
    else:
        points = [(point.at, point.value, point.plus_minus) for point in mine]
    return replace(line, printed=points)
