"""How optimizers stand over the tasks of a table: each in a line, every pair, and what the filters did."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from koala.tables import layout, stats
from koala.tables.build import Entry, Table, compared, leader, rank
from koala.tables.figures import reading
from koala.tables.metric import Metric
from koala.tables.plots import Frame, Line, plot
from koala.tables.render import escape_markdown, markdown_row
from koala.tables.spec import FULL
from koala.tables.style import style


@dataclass(frozen=True)
class Task:
    """One measured group of a table: what its optimizers were compared on, and their cells."""

    table: Table
    where: str
    metric: Metric
    entries: dict[str, Entry]

    @property
    def title(self) -> str:
        """Table, task and number, for a page over all tables."""
        spec, profile = self.table.spec, self.table.profile.name
        shown = f"[{spec.name}](tables/{spec.name}.md)" + ("" if profile == FULL else f" ({profile})")
        return " · ".join([shown, *(escape_markdown(text) for text in (self.where, self.metric.label) if text)])

    @functools.cached_property
    def compared(self) -> dict[str, Entry]:
        """The cells by optimizer, if they may be compared as the table compares them; else none."""
        fair = compared(list(self.entries.values()), self.metric)
        return {name: entry for name, entry in self.entries.items() if entry in fair}

    @property
    def samples(self) -> dict[str, dict[int, float]]:
        """Their runs by optimizer and seed."""
        return {name: entry.numbers[self.metric.name].samples for name, entry in self.compared.items()}

    @property
    def best(self) -> str:
        """The optimizer with the best number shown."""
        first = leader(list(self.compared.values()), self.metric)
        return next(name for name, entry in self.compared.items() if entry is first)

    @functools.cached_property
    def ahead(self) -> dict[str, list[str]]:
        """By optimizer, those that are better beyond noise."""
        return {
            name: [other for other, theirs in self.samples.items() if stats.beats(theirs, mine, self.metric.better)]
            for name, mine in self.samples.items()
        }

    def factor(self, name: str) -> float:
        """How many times the best number shown is that of `name`, or it of the best where more is better; infinite for
        a failure, and for what is no multiple of a best of zero."""
        best, mine = (rank(self.compared[one], self.metric) for one in (self.best, name))
        if mine == best:
            return 1.0 if math.isfinite(best) else math.inf
        below, above = (mine, best) if self.metric.better == "higher" else (best, mine)
        return above / below if 0 < below < math.inf else math.inf

    def costs(self, name: str) -> np.ndarray:
        """The runs of `name` such that less is better."""
        return np.array(list(self.samples[name].values())) * (-1 if self.metric.better == "higher" else 1)

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
                where = " · ".join(table.spec.axis(name).value(value).label for name, value in rest.items())
                found.append(Task(table, where, metric, measured))
    return found


def names_of(found: list[Task]) -> dict[str, str]:
    """Labels of all optimizers by name, in order of appearance."""
    names: dict[str, str] = {}
    for task in found:
        for name in task.entries:
            names.setdefault(name, task.label(name))
    return names


def comparable_tasks(table: Table) -> list[Task]:
    """The tasks of a table that may be compared, where there are several; else none."""
    comparable = [task for task in tasks([table]) if task.compared]
    return comparable if len(comparable) > 1 else []


def over_tasks(table: Table, figures: Path, link: str) -> list[str]:
    """What can be said over the tasks of a table, as Markdown: nothing where there are not several to be compared. The
    figure of the performance profiles goes to `figures`, a folder that the page reaches by `link`."""
    comparable = comparable_tasks(table)
    if not comparable:
        return []
    names = names_of(comparable)
    title = f"Performance profiles over {len(comparable)} tasks"
    drawn = profiles(comparable, names)
    wide = drawn[0].x[-1] > 4  # else a logarithmic axis would have no tick but 1
    frame = Frame(title, "factor of the best on the task", "share of its tasks", log_x=wide)
    file = f"{table.spec.name}-profiles.svg"
    plot({"": drawn}, frame, figures / file)
    lines = [
        "## Over tasks",
        "",
        f"By {comparable[0].metric.label}. Beyond noise: {stats.BEYOND}. Of the many comparisons here one in twenty "
        "would seem so by chance.",
        "",
        *bullets(comparable),
        "",
        f"{title}: of the tasks an optimizer was run on, the share on which its number is within a factor of the best "
        "(AlgoPerf's profiles; a failure is never within any). Typically, above: the median over its tasks of that "
        "factor.",
        "",
        f"![{title}]({link}/{file})",
        "",
        "Probability that a run of the row is better than a run of the column (Mann-Whitney's U over the product of "
        "the runs, averaged over the tasks both were run on; in brackets, how many). Bold: beyond noise, p &lt; 0.05 "
        "by the normal approximation to U, the tasks' variances added.",
        "",
        "| | " + " | ".join(map(escape_markdown, names.values())) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for one, label in names.items():
        cells = ["–" if one == other else _improvement(comparable, one, other) for other in names]
        lines.append(f"| {escape_markdown(label)} | " + " | ".join(cells) + " |")
    return lines + filters(comparable)


def bullets(comparable: list[Task]) -> list[str]:
    """The standings as a list in Markdown."""
    return [f"- **{escape_markdown(label)}**: {line}" for label, line in standings(comparable).items()]


def standings(comparable: list[Task]) -> dict[str, str]:
    """One line an optimizer, by its label: on how many tasks it is the best or level with it (as its cells are marked),
    how often it wins and loses."""
    lines = {}
    for name, label in names_of(comparable).items():
        mine = [task for task in comparable if name in task.compared]
        won = sum(name in better for task in mine for better in task.ahead.values())
        lost = sum(len(task.ahead[name]) for task in mine)
        pairs = sum(len(task.compared) - 1 for task in mine)
        numbers = [task.compared[name].numbers[task.metric.name] for task in mine]
        level = sum(number.best or number.tied for number in numbers)
        middle = float(np.median([task.factor(name) for task in mine]))
        typically = f"typically {middle:.2f} times the best"
        if middle == math.inf:
            failed = 2 * sum(number.value is None for number in numbers) >= len(mine)
            typically = "failed on half of its tasks or more" if failed else "typically no multiple of a best of 0"
        lines[label] = (
            f"best, or not beyond noise of it, on {level} of {len(mine)} tasks; better beyond noise in {won} of "
            f"{pairs} comparisons, worse in {lost}; {typically}."
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
                rows.append([task.where, task.label(name), point, ", ".join(map(task.label, ahead)), *told])
    if not rows:
        return []
    return [
        "",
        "### Where a filter is behind, and what it did meanwhile",
        "",
        "Medians over the runs, after the first, the middle and the last evaluation. R: the noise of the measured "
        "loss; P: the covariance (KOALA-V's s, KOALA-M's P11). While P |g|² is small beside R, the step is SGD's at "
        "the rate lr P L / R of the training loss L: compare it with the rates that the table chose for others.",
        "",
        "| Task | Filter | at | behind, beyond noise | R | P | rate lr P L / R |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        *map(markdown_row, rows),
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


def profiles(comparable: list[Task], names: dict[str, str]) -> list[Line]:
    """For each optimizer, the share of its tasks on which its number is within a factor tau of the best one."""
    factors = {name: [task.factor(name) for task in comparable if name in task.compared] for name in names}
    largest = max((factor for found in factors.values() for factor in found if math.isfinite(factor)), default=1.0)
    taus = np.geomspace(1.0, max(1.1, largest * 1.1), 60)
    none = np.full(len(taus), math.nan)
    return [
        Line(names[name], style(name) | {"drawstyle": "steps-post"}, taus,
             np.array([np.mean([factor <= tau for factor in found]) for tau in taus]), none, none)
        for name, found in factors.items()
    ]  # fmt: skip


def _improvement(comparable: list[Task], one: str, other: str) -> str:
    pairs = [(task.costs(one), task.costs(other)) for task in comparable
             if one in task.compared and other in task.compared]  # fmt: skip
    if not pairs:
        return ""
    value, p = stats.improvement_over_tasks(pairs)
    return f"**{value:.2f}** ({len(pairs)})" if p < 1 - stats.LEVEL else f"{value:.2f} ({len(pairs)})"
