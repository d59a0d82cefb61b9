"""Panels of lines: matplotlib, and nothing of what the lines mean."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from koala.records import write_atomically

LARGEST = 12  # panels in one figure; a figure of more shows its first
DECADE = 10.0  # from this ratio of the largest to the smallest on, an axis is logarithmic
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
    "axes.titlesize": 10, "lines.linewidth": 1.6, "lines.markersize": 4.5, "svg.hashsalt": "koala",
    "svg.fonttype": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line: its points, the interval around them (NaN: none), its style, points of a paper beside it (x, y, error),
    and the point to ring."""

    label: str
    style: dict
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    printed: list[tuple[float, float, float]] = field(default_factory=list)
    ring: tuple[float, float] | None = None


@dataclass(frozen=True)
class Figure:
    """What is drawn: the lines of each panel by its title, what the axes measure, and the caption.

    y is logarithmic where its values span a decade, unless `log_y` decides. `ylabel` is that of all panels, or of each
    by its title.
    """

    name: str
    title: str
    caption: str
    panels: dict[str, list[Line]]
    xlabel: str
    ylabel: str | dict[str, str]
    log_x: bool = False
    log_y: bool | None = None


def plot(figure: Figure, path: Path) -> None:
    """Draws one panel a title, and one legend, as svg or png by the suffix of `path`."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may not be installed here; nothing is shown
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    shown = list(figure.panels.items())[:LARGEST]
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's file of settings would change the figures, or need LaTeX
        matplotlib.rcParams.update(STYLE)
        drawn = Canvas(figsize=(4.2 * across + 1.8, 2.9 * down + 0.3))
        axes = drawn.subplots(down, across, squeeze=False)
        legend = {}
        for axis, (title, lines) in zip(axes.flat, shown, strict=False):
            ylabel = figure.ylabel if isinstance(figure.ylabel, str) else figure.ylabel[title]
            axis.set(title=_plain(title), xlabel=_plain(figure.xlabel), ylabel=_plain(ylabel))
            legend |= {_plain(line.label): _draw(axis, line) for line in lines}
            _scale(axis, figure, lines)
        for axis in list(axes.flat)[len(shown) :]:
            axis.axis("off")
        drawn.suptitle(_plain(figure.title), fontsize=11)
        drawn.tight_layout(rect=(0, 0, 1 - 1.8 / drawn.get_figwidth(), 1))
        drawn.legend(legend.values(), legend, loc="center right", frameon=False)
        # No date and a fixed salt: the same numbers give the same file.
        metadata, format = {"Date": None} if path.suffix == ".svg" else {"Software": None}, path.suffix[1:]
        write_atomically(path, lambda file: drawn.savefig(file, format=format, dpi=110, metadata=metadata))


def _draw(axis, line: Line):
    """Draws a line; returns what stands for it in the legend."""
    [drawn] = axis.plot(line.x, line.y, markevery=max(1, len(line.x) // 6), **line.style)
    color = line.style["color"]
    if np.isfinite(line.low).any():
        axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    for x, y, error in line.printed:
        axis.errorbar(x, y, error or None, fmt="x", color=color, markersize=8, markeredgewidth=2, capsize=3)
    if line.ring:
        axis.plot(*line.ring, "o", markersize=11, markerfacecolor="none", markeredgecolor=color)
    return drawn


def _scale(axis, figure: Figure, lines: list[Line]) -> None:
    values = np.concatenate([[*line.y, *(y for _, y, _ in line.printed)] for line in lines])
    values = values[np.isfinite(values)]
    least, most = values.min(), values.max()
    log_y = figure.log_y if figure.log_y is not None else bool(0 < least < most / DECADE)
    axis.set(xscale="log" if figure.log_x else "linear", yscale="log" if log_y else "linear")
    if least < most:  # an interval of few runs may reach far beyond all that was measured
        spare = (most / least) ** 0.2 if log_y else 0.2 * (most - least)
        least, most = (least / spare, most * spare) if log_y else (least - spare, most + spare)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, least), min(high, most))
    for part, log in ((axis.xaxis, figure.log_x), (axis.yaxis, log_y)):
        if log:
            _decades(part, 7 if part is axis.xaxis else "auto")


def _decades(part, most: int | str) -> None:
    """Ticks at 1, 2 and 5 where there are few decades, with plain numbers: `most` of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = part.get_view_interval()
    part.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < DECADE**2.2 else (1,), numticks=most))
    part.set_major_formatter(StrMethodFormatter("{x:g}"))
    part.set_minor_formatter(NullFormatter())


def _plain(text: str) -> str:
    """`text` without matplotlib's mathematics."""
    return text.replace("$", r"\$")
