"""Pictures of a table's runs: learning curves, error against wall time, and what the filters estimate."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from koala.tables.build import Table

# What the filters estimate, by the name of its figure. The gain is that of a small gradient, lr P / R: the innovation
# times it times the gradient is the step; a larger gradient has less, lr P / (P |h|^2 + R).
INTERNALS = {
    "noise": "measurement noise R",
    "covariance": "covariance P of the weights",
    "gain": "gain, lr P / R",
}
COLORS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#8d5a97", "#5f6368", "#bc6c25")
LARGEST = 12  # panels in one picture; a table with more shows its first


@dataclass(frozen=True)
class Figure:
    """A drawn picture: what it shows and its file."""

    name: str
    caption: str
    path: Path
    panels: int


@dataclass(frozen=True)
class Curve:
    """Runs of one cell on a common axis: mean and range over the seeds."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


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


def curve(histories: list[list[dict]], y: str, x: str) -> Curve | None:
    """Mean and range of `y` over the runs that measured it, at the k-th evaluation of each, up to the shortest run.

    Evaluations fall on the same epochs in every run of a cell; their wall times differ, so `x` is averaged too.
    """
    series = [
        [(row[x], value) for row in rows if row.get(x) is not None and (value := reading(row, y)) is not None]
        for rows in histories
    ]
    series = [points for points in series if points]
    if not series:
        return None
    length = min(len(points) for points in series)
    values = np.array([points[:length] for points in series], dtype=float)
    ys = values[:, :, 1]
    return Curve(values[:, :, 0].mean(0), ys.mean(0), ys.min(0), ys.max(0))


@dataclass(frozen=True)
class Picture:
    """What to draw: a quantity against another, under which names."""

    name: str
    y: str
    x: str
    ylabel: str
    xlabel: str
    caption: str
    log: bool = False


def draw(table: Table, folder: Path, kind: str = "svg") -> list[Figure]:
    """Draws what the runs allow, as `<folder>/<table>-<what>.<kind>` (svg or png); no runs, no figures."""
    figures = [_panels(table, picture, folder, kind) for picture in pictures(table)]
    return [figure for figure in figures if figure is not None]


def pictures(table: Table) -> list[Picture]:
    """The table's main metric by epoch and by time, and the filters' internals."""
    found = []
    metric = next((metric for metric in table.metrics if metric.key is not None), None)
    if metric is not None:
        key = metric.key
        if not any(key in row for run in table.evidence for row in run["history"]):
            key = key.replace("test_", "val_")  # a test set that is looked at once, at the end, has no curve
        plain = key == metric.key and metric.below is None and metric.after_seconds is None and metric.scale == 1
        label = metric.label if plain else key.replace("_", " ").replace("top1", "top-1").replace("ppl", "perplexity")
        title = f"{table.spec.title} ({table.profile.name} profile): {label}"
        by_epoch, by_time = f"{title} by epoch, mean and range over the seeds", f"{title} against training time"
        found.append(Picture("curves", key, "epoch", label, "epoch", by_epoch))
        found.append(Picture("time", key, "seconds", label, "training time (s)", by_time))
    for name, label in INTERNALS.items():
        found.append(
            Picture(name, name, "epoch", label, "epoch", f"{table.spec.title}: the filter's {label}", log=True)
        )
    return found


def _panels(table: Table, picture: Picture, folder: Path, kind: str) -> Figure | None:
    """One panel for each combination of the other axes, one line for each value of the compared one."""
    plt = _pyplot()
    spec, panels = table.spec, {}
    for entry in table.entries:
        drawn = curve([row["history"] for row in entry.rows], picture.y, picture.x)
        if drawn is not None:
            rest = [spec.axis(axis).value(value).label for axis, value in entry.key.items() if axis != spec.compare]
            panels.setdefault(_plain(" · ".join(rest)), []).append((entry.key[spec.compare], drawn))
    if not panels:
        return None
    shown = list(panels.items())[:LARGEST]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    values = [value.name for value in spec.axis(spec.compare).values]
    names = {value for _, lines in shown for value, _ in lines}
    figure, axes = _grid(plt, down, across, legend=-(-len(names) // (2 * across)))
    for axis, (title, lines) in zip(axes.flat, shown, strict=False):
        for value, drawn in lines:
            color = COLORS[values.index(value) % len(COLORS)]
            style = ("-", "--", ":")[values.index(value) // len(COLORS) % 3]
            label, marker = _plain(spec.axis(spec.compare).value(value).label), "o" if len(drawn.x) < 3 else None
            axis.plot(drawn.x, drawn.mean, style, color=color, label=label, marker=marker, markersize=4)
            axis.fill_between(drawn.x, drawn.low, drawn.high, color=color, alpha=0.18, linewidth=0)
        low, high = min(drawn.low.min() for _, drawn in lines), max(drawn.high.max() for _, drawn in lines)
        scale = "log" if picture.log and 0 < low < high / 30 else "linear"
        axis.set(title=title, xlabel=picture.xlabel, ylabel=_plain(picture.ylabel), yscale=scale)
        axis.locator_params("x", nbins=5)
        if scale == "linear":
            axis.locator_params("y", nbins=5)
        else:
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
    for axis in list(axes.flat)[len(shown) :]:
        axis.axis("off")
    handles = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(len(handles), 2 * across))
    more = f" (the first {LARGEST} of {len(panels)} panels)" if len(panels) > LARGEST else ""
    path = Path(folder) / f"{spec.name}-{picture.name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and a fixed salt: the same numbers give the same file.
    figure.savefig(path, dpi=110, metadata={"Date": None} if kind == "svg" else {"Software": None})
    plt.close(figure)
    return Figure(f"{spec.name}-{picture.name}", picture.caption + more, path, len(shown))


def _grid(plt, down: int, across: int, legend: int):
    """Axes at fixed distances, in inches, above `legend` lines of names.

    matplotlib's own layout engines measure every label several times over.
    """
    left, right, top, bottom = 0.85, 0.15, 0.35, 0.65 + 0.22 * legend
    size = (4.3 * across, 2.7 * down + bottom - 0.3)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    room = {"left": left / size[0], "right": 1 - right / size[0], "bottom": bottom / size[1], "top": 1 - top / size[1]}
    figure.subplots_adjust(**room, wspace=0.3, hspace=0.45)
    return figure, axes


def _plain(text: str) -> str:
    """`text` without matplotlib's mathematics."""
    return text.replace("$", r"\$")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = ("axes.spines.top", "axes.spines.right", "legend.frameon")
    plt.rcParams.update(dict.fromkeys(plain, False))
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25})
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "svg.hashsalt": "koala", "svg.fonttype": "path"})
    return plt
