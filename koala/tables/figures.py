"""Pictures of a table's runs: learning curves, error against wall time, and what the filters estimate."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from koala.tables.build import Table

INTERNALS = {
    "filter_R": "measurement noise R",
    "filter_P11": "covariance P",
    "filter_sigma": "covariance P",
    "filter_S": "innovation S",
    "filter_gain": "gain",
}
COLORS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#8d5a97", "#5f6368", "#bc6c25")
LARGEST = 12  # panels in one picture; a table with more shows its first


@dataclass(frozen=True)
class Figure:
    """A drawn picture: what it shows and its file."""

    name: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Curve:
    """Runs of one cell on a common axis: mean and range over the seeds."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(histories: list[list[dict]], y: str, x: str) -> Curve | None:
    """Mean and range of `y` over the runs that measured it, at the k-th evaluation of each, up to the shortest run.

    Evaluations fall on the same epochs in every run of a cell; their wall times differ, so `x` is averaged too.
    """
    series = [
        [(row[x], row[y]) for row in rows if row.get(y) is not None and row.get(x) is not None] for rows in histories
    ]
    series = [points for points in series if points]
    if not series:
        return None
    length = min(len(points) for points in series)
    values = np.array([points[:length] for points in series], dtype=float)
    ys = values[:, :, 1]
    return Curve(values[:, :, 0].mean(0), ys.mean(0), ys.min(0), ys.max(0))


def draw(table: Table, folder: Path, kind: str = "svg") -> list[Figure]:
    """Draws what the runs allow, as `<folder>/<table>-<what>.<kind>` (svg or png); no runs, no figures."""
    keys = [metric for metric in table.metrics if metric.key is not None]
    figures = []
    if table.measured and keys:
        metric = keys[0]
        label = metric.label if metric.below is None and metric.after_seconds is None else metric.key.replace("_", " ")
        title = f"{table.spec.title} ({table.profile.name} profile)"
        figures.append(
            _panels(
                table,
                folder,
                kind,
                "curves",
                metric.key,
                "epoch",
                label,
                "epoch",
                f"{title}: {label} by epoch, mean and range over the seeds",
            )
        )
        figures.append(
            _panels(
                table,
                folder,
                kind,
                "time",
                metric.key,
                "seconds",
                label,
                "training time (s)",
                f"{title}: {label} against training time",
            )
        )
    for key, label in INTERNALS.items():
        if any(row.get(key) is not None for run in table.evidence for row in run["history"]):
            figures.append(
                _panels(
                    table,
                    folder,
                    kind,
                    key,
                    key,
                    "epoch",
                    label,
                    "epoch",
                    f"{table.spec.title}: the filter's {label}",
                    log=True,
                )
            )
    return [figure for figure in figures if figure]


def _panels(
    table: Table,
    folder: Path,
    kind: str,
    name: str,
    y: str,
    x: str,
    ylabel: str,
    xlabel: str,
    caption: str,
    log: bool = False,
) -> Figure | None:
    """One panel for each combination of the other axes, one line for each value of the compared one."""
    plt = _pyplot()
    spec, panels = table.spec, {}
    for entry in table.entries:
        drawn = curve([row["history"] for row in entry.rows], y, x)
        if drawn is not None:
            rest = [spec.axis(axis).value(value).label for axis, value in entry.key.items() if axis != spec.compare]
            panels.setdefault(" · ".join(rest), []).append((entry.key[spec.compare], drawn))
    if not panels:
        return None
    shown = list(panels.items())[:LARGEST]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    values = [value.name for value in spec.axis(spec.compare).values]
    figure, axes = plt.subplots(down, across, figsize=(1.2 + 4.0 * across, 0.8 + 2.9 * down), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, shown, strict=False):
        for value, drawn in lines:
            color = COLORS[values.index(value) % len(COLORS)]
            style = ("-", "--", ":")[values.index(value) // len(COLORS) % 3]
            axis.plot(
                drawn.x,
                drawn.mean,
                style,
                color=color,
                label=spec.axis(spec.compare).value(value).label,
                marker="o" if len(drawn.x) < 3 else None,
                markersize=4,
            )
            axis.fill_between(drawn.x, drawn.low, drawn.high, color=color, alpha=0.18, linewidth=0)
        positive = all((drawn.low > 0).all() for _, drawn in lines)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log and positive else "linear")
    for axis in list(axes.flat)[len(shown) :]:
        axis.axis("off")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4 if across > 1 else 2)
    )
    if len(panels) > LARGEST:
        caption += f" (the first {LARGEST} of {len(panels)} panels)"
    return _save(figure, folder, kind, table, name, caption)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A fixed salt and no date: the same numbers give the same file.
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 10,
            "axes.titlesize": 10,
            "legend.frameon": False,
            "svg.hashsalt": "koala",
            "svg.fonttype": "path",
            "text.parse_math": False,
        }
    )
    return plt


def _save(figure, folder: Path, kind: str, table: Table, name: str, caption: str) -> Figure:
    path = Path(folder) / f"{table.spec.name}-{name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if kind == "svg" else {"Software": None})
    _pyplot().close(figure)
    return Figure(f"{table.spec.name}-{name}", caption, path)
