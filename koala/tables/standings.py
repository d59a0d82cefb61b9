"""How optimizers stand over the tasks of a table, each in a row."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from koala.tables import stats
from koala.tables.table import Entry, Number, Table, compared
from koala.tables.text import escape_markdown, images, markdown_table

STANDINGS = (
    "Wins and losses: comparisons with another optimizer on a task in which the difference is significant. Typical "
    "ratio: the median over the tasks of an optimizer's number over the best one (∞: it failed on half of them or "
    "more). Step cost: the median of a step's time over that of the reference in the same command."
)
PROFILES = (
    "Performance profiles: of the tasks an optimizer was run on, the share on which its number is within a factor of "
    "the best, as in AlgoPerf. A failure is never within any."
)


@dataclass(frozen=True)
class Task:
    """One measured group of a table: what its optimizers were compared on, by which metric, and their cells."""

    table: Table
    where: str
    name: str
    entries: dict[str, Entry]

    @functools.cached_property
    def numbers(self) -> dict[str, Number]:
        """By optimizer, the numbers that may be compared as the table compares them; else none."""
        fair = compared(list(self.entries.values()), self.name)
        return {name: entry.numbers[self.name] for name, entry in self.entries.items() if entry in fair}

    @functools.cached_property
    def ahead(self) -> dict[str, list[str]]:
        """By optimizer, those that are significantly better."""
        return {
            name: [other for other, theirs in self.numbers.items()
                   if stats.beats(theirs.samples, number.samples, number.metric.better)]
            for name, number in self.numbers.items()
        }  # fmt: skip

    def factor(self, name: str) -> float:
        """How many times the best number shown is that of `name`, or it of the best where more is better; infinite for
        a failure, and for what is no multiple of a best of zero."""
        best, this = min(number.rank for number in self.numbers.values()), self.numbers[name].rank
        if this == best:
            return 1.0 if math.isfinite(best) else math.inf
        above, below = (-best, -this) if self.numbers[name].metric.better == "higher" else (this, best)
        return above / below if 0 < below < math.inf else math.inf

    def label(self, name: str) -> str:
        """What the table calls the optimizer `name`."""
        compare = self.table.experiment.compare
        return self.table.experiment.labels({compare: self.entries[name].key[compare]})[0]


def tasks(table: Table) -> list[Task]:
    """Every measured group in which each optimizer stands once, ranked by the table's first metric; a table of one
    optimizer's variants is no task."""
    experiment, result = table.experiment, []
    name = next((name for name, metric in table.metrics.items() if metric.better != "neither"), None)
    for entries in table.groups() if name else ():
        rows = [entry for entry in entries if entry.rows]
        measured = {experiment.optimizer(entry.key): entry for entry in rows}
        if len(measured) == len(rows) > 1:
            where = " · ".join(experiment.labels(experiment.rest(entries[0].key)))
            result.append(Task(table, where, name, measured))
    return result


def comparable(table: Table) -> list[Task]:
    """The tasks of a table that may be compared, where there are several; else none."""
    compared = [task for task in tasks(table) if task.numbers]
    return compared if len(compared) > 1 else []


def labels(tasks: list[Task]) -> dict[str, str]:
    """Labels of all optimizers by name, in order of appearance."""
    names: dict[str, str] = {}
    for task in tasks:
        names |= {name: task.label(name) for name in task.entries if name not in names}
    return names


def cost(table: Table) -> str | None:
    """The metric that has a step's time over the reference's, if the table has one."""
    metrics = table.metrics.items()
    return next((name for name, one in metrics if one.record == "step_ms" and one.relative is not None), None)


def standings(tasks: list[Task]) -> pd.DataFrame:
    """A row an optimizer: on how many tasks it is best or tied (as its cells are marked), how often it is significantly
    better and worse than another, how many times the best number its own is, and what its step costs."""
    rows = []
    step = cost(tasks[0].table)
    for name, label in labels(tasks).items():
        run_on = [task for task in tasks if name in task.numbers]
        numbers, pairs = [task.numbers[name] for task in run_on], sum(len(task.numbers) - 1 for task in run_on)
        ratio = float(np.median([task.factor(name) for task in run_on]))
        costs = [task.entries[name].numbers[step].value for task in run_on if step]
        costs = [value for value in costs if value is not None]
        rows.append({
            "Optimizer": label,
            "Best or tied": f"{sum(number.best or number.tied for number in numbers)} of {len(run_on)}",
            "Wins": f"{sum(name in better for task in run_on for better in task.ahead.values())} of {pairs}",
            "Losses": f"{sum(len(task.ahead[name]) for task in run_on)} of {pairs}",
            "Typical ratio": f"{ratio:.2f}" if math.isfinite(ratio) else "∞",
            "Step cost": f"{np.median(costs):.2f}" if costs else "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def over_tasks(table: Table, profiles: tuple[str, dict[str, str]] | None = None) -> list[str]:
    """How optimizers stand over the tasks of a table, in Markdown: nothing where there are not several to be compared.

    Args:
        profiles: caption and link of the figure of performance profiles.
    """
    if not (tasks := comparable(table)):
        return []
    labels = dict.fromkeys(number.metric.label for task in tasks for number in task.numbers.values())
    chance = "Of the many comparisons here one in twenty would seem so by chance."
    lines = ["## Over tasks", "", f"By {' or '.join(labels)}. {STANDINGS} Significant: {stats.TESTS}. {chance}", ""]
    lines += [*markdown_table(standings(tasks).map(escape_markdown), right=5), ""]
    return lines + ([*images(*profiles), "", PROFILES] if profiles else [])
