"""The numbers printed in the papers: `results/published/<paper>.yaml`."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from koala.errors import ConfigError
from koala.tables.experiment import Experiment
from koala.tables.parts import Key, Scalar, read_yaml

VALUES = ("_error", "_ppl", "_accuracy", "_std", "fid", "_epochs", "_after_3h", "seconds_per_epoch")


@dataclass(frozen=True)
class PublishedTable:
    """One printed table: where it stands, and its cells as (what the cell is, the numbers in it)."""

    citation: str
    place: str
    note: str
    cells: tuple[tuple[Key, dict[str, float]], ...]

    def find(self, key: Key) -> dict[str, float]:
        """The numbers of the printed cell whose every name is in `key`; empty when the paper has no such cell."""
        same = (numbers for names, numbers in self.cells if names.items() <= key.items())
        return next(same, {})


@dataclass(frozen=True)
class PrintedPoint:
    """A point read off a printed figure: of which cell, at which x, and how well it could be read."""

    names: dict[str, Scalar]
    x: str
    at: float
    value: float
    plus_minus: float


def load_published(root: Path, experiment: Experiment) -> PublishedTable | None:
    """The printed table that `experiment` answers to, or None when it answers to none.

    Raises:
        ConfigError: the experiment names a paper or table that `root` does not hold.
    """
    if experiment.published is None:
        return None
    paper, table = _find(root, experiment, experiment.published, "tables")
    cells = []
    for cell in table["cells"]:
        numbers = {key: seconds(value) if isinstance(value, str) else float(value)
                   for key, value in cell.items() if key.endswith(VALUES)}  # fmt: skip
        cells.append(({key: value for key, value in cell.items() if key not in numbers}, numbers))
    return PublishedTable(paper["citation"], place(experiment.published[1]), table.get("note", ""), tuple(cells))


def load_printed(root: Path, experiment: Experiment) -> dict[str, list[PrintedPoint]]:
    """The points that papers print of the figures of `experiment`, by the figure's name; only those of the figure's own
    metric (ours on test may answer to the paper's on validation).

    Raises:
        ConfigError: a figure names a paper or a printed figure that `root` does not hold.
    """
    numbers, result = ("metric", "x", "at", "value", "plus_minus"), {}
    for name, figure in experiment.figures.items():
        if figure.published is not None:
            _, printed = _find(root, experiment, figure.published, "figures")
            result[name] = [
                PrintedPoint({key: value for key, value in point.items() if key not in numbers}, point["x"],
                             float(point["at"]), float(point["value"]), float(point["plus_minus"]))
                for point in printed["points"]
                if point.get("metric", figure.y).partition("_")[2] == figure.y.partition("_")[2]
            ]  # fmt: skip
    return result


def seconds(text: str) -> float:
    """Seconds in a printed duration such as "3h40m"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration such as 3h40m")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + rest


def place(table: str) -> str:
    """A table's key in words: "supplement_table1" is "supplement, Table 1", "figure1" "Figure 1"."""
    supplement, kind, number = re.fullmatch(r"(supplement_)?(table|figure)(.+)", table).groups()
    return f"{'supplement, ' if supplement else ''}{kind.capitalize()} {number}"


def _find(root: Path, experiment: Experiment, wanted: tuple[str, str], kind: str) -> tuple[dict, dict]:
    """The paper's file, and one of its `tables` or `figures`."""
    papers, (paper, name) = _papers(root), wanted
    if paper not in papers:
        raise ConfigError(f"{experiment.path}: published", paper, "is no paper here", valid=papers)
    if name not in (printed := papers[paper].get(kind, {})):
        raise ConfigError(f"{experiment.path}: published", name, f"is not of the {kind} of {paper}", valid=printed)
    return papers[paper], printed[name]


@functools.cache
def _papers(root: Path) -> dict[str, dict]:
    return {values["paper"]: values for values in map(read_yaml, sorted(Path(root).glob("*.yaml")))}
