"""A panel of lines as a file: matplotlib, and nothing of what the lines mean.

Each optimizer has one colour and one marker in every figure. The first are Okabe and Ito's; the others were chosen
greedily from a grid of 4,096 colours so that any two differ by a CIE76 dE of at least 10.9 to normal, deutan and protan
eyes (Machado et al. 2009), on white and not too pale for it.
"""

import io
import os
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from koala.records import write_atomically

WIDTH, HEIGHT = 4.2, 2.7  # inches of a panel without its legend: on a phone its letters are ten pixels high
DECADE = 10.0  # from this ratio of the largest to the smallest on, an axis is logarithmic
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10,
    "axes.titlesize": 11, "lines.linewidth": 1.6, "lines.markersize": 4.5, "svg.hashsalt": "koala",
    "svg.fonttype": "none",
}  # fmt: skip
LEGEND = {"frameon": False, "fontsize": 8.5, "columnspacing": 0.8, "handlelength": 1.5, "handletextpad": 0.4}
COLORS = {
    "sgd": "#0072B2", "adam": "#E69F00", "koala-m": "#D55E00", "koala-v": "#009E73", "koala++": "#CC79A7",
    "sofim": "#56B4E9", "sgdf": "#332288", "adamw": "#552200", "lbfgs": "#223344", "adahessian": "#99CC77",
    "shampoo": "#DD0044", "kfac": "#3311BB", "adafisher": "#7766FF", "adafisherw": "#0000FF", "adabelief": "#FFAABB",
    "yogi": "#6699FF", "adamax": "#113366", "adamp": "#446633", "amsgrad": "#665577", "fromage": "#552222",
    "adabound": "#2266CC", "lion": "#5544FF", "msvag": "#DD7744", "muon": "#FF4477", "nadamw": "#77DD44",
    "prodigy": "#665500", "radam": "#CCBBDD", "schedule-free-adamw": "#4444CC", "schedule-free-sgd": "#774455",
    "soap": "#993399", "sophia": "#AACC99", "sophia-g": "#221199",
    "padam": "#000044", "adabayes": "#000011", "adabayes-fp": "#001133", "adagrad": "#111100", "alig": "#000066",
    "diagonal-ekf": "#55BB99", "kgd": "#6688BB", "lkf": "#0022DD", "loko": "#AA6655", "momo": "#11BB55",
    "momo-adam": "#FF9966", "metric-identity": "#009900", "metric-adam": "#7722AA", "metric-muon": "#886699",
}  # fmt: skip
OTHERS = ("#2299DD", "#CC1188")  # for optimizers that have none of their own yet
MARKERS = "os^Dv<>pPX*hd"
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Line:
    """One line: its style, its points and the interval around them (None or NaN: none), points of a paper beside it (x,
    y, error), and the point to ring."""

    label: str
    style: dict
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    printed: list[tuple[float, float, float]] = field(default_factory=list)
    ring: tuple[float, float] | None = None


@dataclass(frozen=True)
class Figure:
    """The lines of each panel by its title, what the axes measure, and the caption. Each panel is a file of its own.

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


def style(optimizer: str) -> dict[str, str]:
    """matplotlib's colour and marker of an optimizer, by its name in configs/optim."""
    names = list(COLORS)
    at = names.index(optimizer) if optimizer in COLORS else len(names) + sum(optimizer.encode()) % len(OTHERS)
    return {"color": COLORS.get(optimizer, OTHERS[at % len(OTHERS)]), "marker": MARKERS[at % len(MARKERS)]}


def plot(figure: Figure, panel: str, path: Path) -> None:
    """Draws one panel with its legend below, as svg or png by the suffix of `path`."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may not be installed here; nothing is shown
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    lines = figure.panels[panel]
    columns = 3 if len(lines) > 2 else 2
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's file of settings would change the figures, or need LaTeX
        matplotlib.rcParams.update(STYLE)
        drawn = Canvas(figsize=(WIDTH, HEIGHT + 0.2 * -(-len(lines) // columns)), layout="constrained")
        axis = drawn.subplots()
        ylabel = figure.ylabel if isinstance(figure.ylabel, str) else figure.ylabel[panel]
        title = textwrap.fill(_plain(panel or figure.title), 44)
        axis.set(title=title, xlabel=_plain(figure.xlabel), ylabel=_plain(ylabel))
        legend = {_plain(line.label): _draw(axis, line) for line in lines}
        _scale(axis, figure, lines)
        drawn.legend(legend.values(), legend, loc="outside lower center", ncols=columns, **LEGEND)
        # No date and a fixed salt: the same numbers give the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        drawn.savefig(content := io.BytesIO(), format=path.suffix[1:], dpi=110, metadata=metadata)
    write_atomically(path, content.getvalue())


def _draw(axis, line: Line):
    """Draws a line; returns what stands for it in the legend."""
    [drawn] = axis.plot(line.x, line.y, markevery=max(1, len(line.x) // 6), **line.style)
    color = line.style["color"]
    if line.low is not None and np.isfinite(line.low).any():
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
