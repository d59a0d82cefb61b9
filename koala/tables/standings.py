"""How optimizers stand over all tasks they were compared on: each in a line, every pair, and what the filters did."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats as scipy_stats

from koala.tables import layout, stats
from koala.tables.build import Entry, Table
from koala.tables.figures import reading
from koala.tables.metric import Metric
from koala.tables.plots import Frame, Line, plot
from koala.tables.render import escape_markdown
from koala.tables.spec import FULL
from koala.tables.style import style


@dataclass(frozen=True)
class Task:
    """One measured group of a table: what its optimizers were compared on, and their cells."""

    table: Table
    title: str
    metric: Metric
    entries: dict[str, Entry]

    @functools.cached_property
    def samples(self) -> dict[str, dict[int, float]]:
        """Runs by optimizer and seed, of the cells that may be compared: enough runs, of present, committed code."""
        return {
            name: found
            for name, entry in self.entries.items()
            if entry.sound and len(found := entry.numbers[self.metric.name].samples) >= stats.FEWEST
        }

    @property
    def best(self) -> str:
        """The optimizer with the lowest number."""
        return min(self.samples, key=lambda name: float(np.median(list(self.samples[name].values()))))

    @functools.cached_property
    def ahead(self) -> dict[str, list[str]]:
        """By optimizer, those that are better beyond noise."""
        middle = {name: float(np.median(list(found.values()))) for name, found in self.samples.items()}
        return {
            name: [other for other, theirs in self.samples.items()
                   if middle[other] < middle[name] and stats.differ(mine, theirs)]
            for name, mine in self.samples.items()
        }  # fmt: skip

    def label(self, name: str) -> str:
        """What the table calls the optimizer `name`."""
        axis = self.table.spec.axis(self.table.spec.compare)
        return axis.value(self.entries[name].key[axis.name]).label


def tasks(tables: Iterable[Table]) -> list[Task]:
    """Every measured group in which each optimizer stands once; a table of one optimizer's variants is no task."""
    found = []
    for table in tables:
        for entries in table.groups():
            rows = [entry for entry in entries if entry.rows]
            measured = {table.spec.optimizer(entry.key): entry for entry in rows}
            if len(measured) > 1 and len(measured) == len(rows):
                metric = next(metric for metric in table.metrics if metric.better != "neither")
                rest = table.spec.rest(entries[0].key)
                where = [table.spec.axis(name).value(value).label for name, value in rest.items()]
                shown = "" if table.profile.name == FULL else f" ({table.profile.name})"
                title = " · ".join([f"[{table.spec.name}](tables/{table.spec.name}.md){shown}", *where, metric.label])
                found.append(Task(table, title, metric, measured))
    return found


def names_of(found: list[Task]) -> dict[str, str]:
    """Labels of all optimizers by name, in order of appearance."""
    names: dict[str, str] = {}
    for task in found:
        for name in task.entries:
            names.setdefault(name, task.label(name))
    return names


def over_tasks(found: list[Task], figures: Path) -> list[str]:
    """What can be said over the tasks that may be compared; the performance profiles' figure goes to `figures`."""
    comparable = [task for task in found if len(task.samples) > 1 and task.metric.better == "lower"]
    lines = ["", "## Over tasks", ""]
    if len(comparable) < 2:
        return [*lines, "Too few tasks with enough runs of the present, committed code; see the columns above."]
    names = names_of(comparable)
    title = f"Performance profiles over {len(comparable)} tasks"
    drawn = profiles(comparable, names)
    wide = drawn[0].x[-1] > 4  # else a logarithmic axis would have no tick but 1
    frame = Frame(title, "factor of the best on the task", "share of its tasks", log_x=wide)
    plot({"": drawn}, frame, figures / "profiles.svg")
    lines += [
        f"Beyond noise: {stats.BEYOND}. Of the many comparisons here one in twenty would seem so by chance.",
        "",
        *standings(comparable, names),
        "",
        f"{title}: of the tasks an optimizer was run on, the share on which its median is within a factor of the "
        "best (AlgoPerf's profiles; a failure is never within any).",
        "",
        f"![{title}](figures/profiles.svg)",
        "",
        "Probability that a run of the row is better than a run of the column (Mann-Whitney's U over the product of "
        "the runs, averaged over the tasks both were run on; in brackets, how many). Bold: one half is outside its "
        "95 % bootstrap interval over runs within tasks.",
        "",
        "| | " + " | ".join(map(escape_markdown, names.values())) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for one, label in names.items():
        cells = ["–" if one == other else _improvement(comparable, one, other) for other in names]
        lines.append(f"| {escape_markdown(label)} | " + " | ".join(cells) + " |")
    return lines + filters(comparable)


def standings(comparable: list[Task], names: dict[str, str]) -> list[str]:
    """One line an optimizer: on how many tasks it is the best or level with it, how often it wins and loses."""
    ratios = _ratios(comparable)
    lines = []
    for name, label in names.items():
        mine = [task for task in comparable if name in task.samples]
        won = sum(name in better for task in mine for better in task.ahead.values())
        lost = sum(len(task.ahead[name]) for task in mine)
        pairs = sum(len(task.samples) - 1 for task in mine)
        level = sum(task.best not in task.ahead[name] for task in mine)
        middle = float(np.median(ratios[name]))
        typically = f"typically {middle:.2f} times the best" if math.isfinite(middle) else "mostly fails"
        lines.append(
            f"- **{escape_markdown(label)}**: best, or not beyond noise of it, on {level} of {len(mine)} tasks; better "
            f"beyond noise in {won} of {pairs} comparisons, worse in {lost}; {typically}."
        )
    return lines


def filters(comparable: list[Task]) -> list[str]:
    """Where a filter is behind the best beyond noise, and what it did meanwhile: its noise, covariance and rate."""
    rows = []
    for task in comparable:
        for name, entry in task.entries.items():
            ahead = task.ahead.get(name, [])
            told = [_told(entry, quantity) for quantity in ("noise", "covariance", "rate")]
            if ahead and any(told):
                point = layout.point_text(entry.point) or "as it comes"
                rows.append([task.title, task.label(name), point, ", ".join(map(task.label, ahead)), *told])
    if not rows:
        return []
    return [
        "",
        "## Where a filter is behind, and what it did meanwhile",
        "",
        "Medians over the runs, after the first, the middle and the last evaluation. R: the noise of the measured "
        "loss; P: the covariance (KOALA-V's s, KOALA-M's P11). While P |g|² is small beside R, the step is SGD's at "
        "the rate lr P L / R of the training loss L: compare it with the rates that the table chose for others.",
        "",
        "| Task | Filter | at | behind, beyond noise | R | P | rate lr P L / R |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        *(f"| {row[0]} | " + " | ".join(map(escape_markdown, row[1:])) + " |" for row in rows),
    ]


def _told(entry: Entry, quantity: str) -> str:
    """What a filter's quantity was over the run: "12 → 3.1 → 0.5"; "" for what has none."""
    runs = [[value for row in run["history"] if (value := _quantity(row, quantity)) is not None] for run in entry.rows]
    runs = [values for values in runs if values]
    if not runs:
        return ""
    at = lambda share: float(np.median([values[round(share * (len(values) - 1))] for values in runs]))  # noqa: E731
    return " → ".join(f"{at(share):.2g}" for share in (0.0, 0.5, 1.0))


def _quantity(row: dict, quantity: str) -> float | None:
    if quantity != "rate":
        return reading(row, quantity)
    gain, loss = reading(row, "gain"), row.get("train_loss")
    return None if gain is None or loss is None else gain * loss


def _ratios(comparable: list[Task]) -> dict[str, list[float]]:
    """By optimizer: its median over the best median, of each of its tasks; infinite where it failed."""
    ratios: dict[str, list[float]] = {}
    for task in comparable:
        medians = {name: float(np.median(list(found.values()))) for name, found in task.samples.items()}
        best = min(medians.values())
        for name, median in medians.items():
            ratios.setdefault(name, []).append(median / best if math.isfinite(median) and best > 0 else math.inf)
    return ratios


def profiles(comparable: list[Task], names: dict[str, str]) -> list[Line]:
    """For each optimizer, the share of its tasks on which its median is within a factor tau of the best one."""
    ratios = _ratios(comparable)
    largest = max((ratio for found in ratios.values() for ratio in found if math.isfinite(ratio)), default=1.0)
    taus = np.geomspace(1.0, max(1.1, largest * 1.1), 60)
    none = np.full(len(taus), math.nan)
    return [
        Line(names[name], style(name) | {"drawstyle": "steps-post"}, taus,
             np.array([np.mean([ratio <= tau for ratio in found]) for tau in taus]), none, none)
        for name, found in ratios.items()
    ]  # fmt: skip


def _improvement(comparable: list[Task], one: str, other: str) -> str:
    pairs = [(list(task.samples[one].values()), list(task.samples[other].values()))
             for task in comparable if one in task.samples and other in task.samples]  # fmt: skip
    if not pairs:
        return ""
    value, low, high = improvement_over_tasks(pairs)
    text = f"{value:.2f}" if low <= 0.5 <= high else f"**{value:.2f}**"
    return f"{text} ({len(pairs)})"


def improvement_over_tasks(pairs: list[tuple[list[float], list[float]]]) -> tuple[float, float, float]:
    """Mean over tasks of the probability that a run of the first is lower, and its bootstrap interval."""
    data = tuple(np.array(runs) for pair in pairs for runs in pair)

    def mean(*arrays: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([stats.improvement(*arrays[at : at + 2]) for at in range(0, len(arrays), 2)], axis=0)

    found = scipy_stats.bootstrap(data, mean, n_resamples=500, method="percentile", rng=np.random.default_rng(1))
    return float(mean(*data)), float(found.confidence_interval.low), float(found.confidence_interval.high)
