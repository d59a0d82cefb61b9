"""Panels of lines with direct labels: matplotlib, and nothing of what the lines mean."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LARGEST = 12  # panels in one picture; a picture of more shows its first
DECADE = 10.0  # from this ratio of the largest to the smallest on, an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """One line: its points, the interval around them (NaN: none), how it looks, points of a paper beside it (x, y,
    error), and the point to ring."""

    label: str
    style: dict
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    printed: list[tuple[float, float, float]] = field(default_factory=list)
    ring: tuple[float, float] | None = None


@dataclass(frozen=True)
class Frame:
    """What the axes say. `log_x` asks for a logarithmic x; y is logarithmic where its values span a decade.

    `ylabel` is that of all panels, or of each by its title.
    """

    title: str
    xlabel: str
    ylabel: str | dict[str, str]
    log_x: bool = False
    log_y: bool | None = None


def plot(panels: dict[str, list[Line]], frame: Frame, path: Path) -> int:
    """Draws one panel a title, as svg or png by the suffix of `path`; returns the number of panels drawn."""
    plt = _pyplot()
    shown = list(panels.items())[:LARGEST]
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    longest = max(len(line.label) for _, lines in shown for line in lines)
    figure, axes = _grid(plt, down, across, room=0.25 + 0.075 * longest)
    for axis, (title, lines) in zip(axes.flat, shown, strict=False):
        ylabel = frame.ylabel if isinstance(frame.ylabel, str) else frame.ylabel[title]
        axis.set(title=_plain(title), xlabel=_plain(frame.xlabel), ylabel=_plain(ylabel))
        for line in lines:
            _draw(axis, line)
        _scale(plt, axis, frame, lines)
        _label(axis, lines)
    for axis in list(axes.flat)[len(shown) :]:
        axis.axis("off")
    figure.suptitle(_plain(frame.title), x=0.02, y=1 - 0.08 / figure.get_figheight(), ha="left", va="top", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and a fixed salt: the same numbers give the same file.
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    plt.close(figure)
    return len(shown)


def _draw(axis, line: Line) -> None:
    every = max(1, len(line.x) // 6)
    axis.plot(line.x, line.y, markersize=4.5, markevery=every, linewidth=1.6, **line.style)
    if np.isfinite(line.low).any():
        axis.fill_between(line.x, line.low, line.high, color=line.style["color"], alpha=0.16, linewidth=0)
    for x, y, error in line.printed:
        axis.errorbar(
            x, y, error or None, fmt="x", color=line.style["color"], markersize=8, markeredgewidth=2, capsize=3
        )
    if line.ring:
        axis.plot(*line.ring, "o", markersize=11, markerfacecolor="none", markeredgecolor=line.style["color"])


def _scale(plt, axis, frame: Frame, lines: list[Line]) -> None:
    values = np.concatenate([line.y for line in lines] + [np.array([y for _, y, _ in line.printed]) for line in lines])
    values = values[np.isfinite(values)]
    log_y = frame.log_y if frame.log_y is not None else bool(0 < values.min() < values.max() / DECADE)
    axis.set(xscale="log" if frame.log_x else "linear", yscale="log" if log_y else "linear")
    if values.min() < values.max():  # an interval of few runs may reach far beyond all that was measured
        spare = (values.max() / values.min()) ** 0.2 if log_y else 0.2 * (values.max() - values.min())
        least, most = (
            (values.min() / spare, values.max() * spare) if log_y else (values.min() - spare, values.max() + spare)
        )
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, least), min(high, most))
    for part, log in ((axis.xaxis, frame.log_x), (axis.yaxis, log_y)):
        if log:
            low, high = part.get_view_interval()
            subs = (1, 2, 5) if high / low < DECADE**2.2 else (1,)
            # across, numbers such as 0.0001 stand side by side: no more of them than there is room for
            most = 7 if part is axis.xaxis else "auto"
            part.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=subs, numticks=most))
            part.set_major_formatter("{x:g}")
            part.set_minor_formatter("")
        else:
            axis.locator_params("x" if part is axis.xaxis else "y", nbins=5)


def _label(axis, lines: list[Line]) -> None:
    """Names at the line ends, moved apart where they would overlap."""
    points = []
    for line in lines:
        finite = np.flatnonzero(np.isfinite(line.y))
        if len(finite):
            points.append((axis.transData.transform((line.x[finite[-1]], line.y[finite[-1]]))[1], line))
    points.sort(key=lambda point: point[0])
    gap, low, high = 13.0, axis.bbox.y0, axis.bbox.y1
    heights: list[float] = []
    for y, _ in points:
        heights.append(max(y, heights[-1] + gap if heights else low))
    over = heights[-1] - high if heights else 0.0
    if over > 0:  # push the top ones down, and those below them as far as they are in the way
        heights[-1] -= over
        for at in range(len(heights) - 2, -1, -1):
            heights[at] = min(heights[at], heights[at + 1] - gap)
    for height, (_, line) in zip(heights, points, strict=True):
        axis.annotate(
            _plain(line.label), xy=(1.02, (height - low) / (high - low)), xycoords="axes fraction", va="center",
            color=line.style["color"], fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _grid(plt, down: int, across: int, room: float):
    """Axes at fixed distances, in inches, with `room` for names at their right.

    matplotlib's own layout engines measure every label several times over.
    """
    left, top, bottom, width, height = 0.8, 0.65, 0.55, 3.6, 2.4
    size = (across * (left + width + room), top + down * height + (down - 1) * 0.8 + bottom)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    figure.subplots_adjust(
        left=left / size[0], right=1 - room / size[0], bottom=bottom / size[1], top=1 - top / size[1],
        wspace=(left + room) / width, hspace=0.8 / height,
    )  # fmt: skip
    return figure, axes


def _plain(text: str) -> str:
    """`text` without matplotlib's mathematics."""
    return text.replace("$", r"\$")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "svg.hashsalt": "koala", "svg.fonttype": "path"})
    return plt
