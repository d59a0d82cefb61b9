"""How optimizers stand over the tasks of a table, each in a row."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from koala.tables import stats
from koala.tables.table import Entry, Number, Table
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
    """One measured group of a table: what its optimizers were run on, their cells, and their numbers by the metric that
    ranks them, if the table compares these."""

    where: str
    entries: dict[str, Entry]
    numbers: dict[str, Number]

    def factor(self, name: str) -> float:
        """How many times the best number shown is that of `name`, or it of the best where more is better; infinite for
        a failure, and for what is no multiple of a best of zero."""
        best, this = min(number.rank for number in self.numbers.values()), self.numbers[name].rank
        if this == best:
            return 1.0 if math.isfinite(best) else math.inf
        above, below = (-best, -this) if self.numbers[name].metric.better == "higher" else (this, best)
        return above / below if 0 < below < math.inf else math.inf


def tasks(table: Table) -> list[Task]:
    """Every measured group in which each optimizer stands once, ranked by the table's first metric; a table of one
    optimizer's variants is no task."""
    result = []
    name = next((name for name, metric in table.metrics.items() if metric.better != "neither"), None)
    for entries in table.groups() if name else ():
        rows = [entry for entry in entries if entry.rows]
        measured = {entry.optimizer: entry for entry in rows}
        if len(measured) == len(rows) > 1:
            numbers = {optimizer: entry.numbers[name] for optimizer, entry in measured.items()}
            compared = {optimizer: number for optimizer, number in numbers.items() if number.others}
            result.append(Task(entries[0].task, measured, compared))
    return result


def comparable(table: Table) -> list[Task]:
    """The tasks of a table that may be compared, where there are several; else none."""
    compared = [task for task in tasks(table) if task.numbers]
    return compared if len(compared) > 1 else []


def labels(tasks: list[Task]) -> dict[str, str]:
    """Labels of all optimizers by name, in order of appearance."""
    names: dict[str, str] = {}
    for task in tasks:
        names |= {name: entry.label for name, entry in task.entries.items() if name not in names}
    return names


def cost(table: Table) -> str | None:
    """The metric that has a step's time over the reference's, if the table has one."""
    metrics = table.metrics.items()
    return next((name for name, one in metrics if one.record == "step_ms" and one.relative is not None), None)


def standings(table: Table) -> pd.DataFrame:
    """A row an optimizer: on how many tasks it is best or tied (as its cells are marked), how often it is significantly
    better and worse than another, how many times the best number its own is, and what its step costs."""
    rows, step = [], cost(table)
    tasks = comparable(table)
    for name, label in labels(tasks).items():
        run_on = [task for task in tasks if name in task.numbers]
        numbers = [task.numbers[name] for task in run_on]
        pairs = sum(number.others for number in numbers)
        ratio = float(np.median([task.factor(name) for task in run_on]))
        costs = [task.entries[name].numbers[step].value for task in run_on if step]
        costs = [value for value in costs if value is not None]
        rows.append({
            "Optimizer": label,
            "Best or tied": f"{sum(number.best or number.tied for number in numbers)} of {len(run_on)}",
            "Wins": f"{sum(number.wins for number in numbers)} of {pairs}",
            "Losses": f"{sum(number.losses for number in numbers)} of {pairs}",
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
    lines += [*markdown_table(standings(table).map(escape_markdown), right=5), ""]
    return lines + ([*images(*profiles), "", PROFILES] if profiles else [])
