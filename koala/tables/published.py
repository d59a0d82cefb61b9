"""The numbers printed in the papers: `results/published/<paper>.yaml`."""

import re
from dataclasses import dataclass
from pathlib import Path

from koala.tables.metric import Scalar
from koala.tables.reader import Node, read_yaml
from koala.tables.spec import Spec

VALUES = ("_error", "_ppl", "_accuracy", "_std", "fid", "_epochs", "_after_3h", "seconds_per_epoch")


@dataclass(frozen=True)
class PublishedTable:
    """One printed table: where it stands, and its cells as (what the cell is, the numbers in it)."""

    citation: str
    place: str
    title: str
    note: str
    cells: tuple[tuple[dict[str, Scalar], dict[str, float]], ...]

    def find(self, key: dict[str, Scalar]) -> dict[str, float]:
        """The numbers of the printed cell whose every name is in `key`; empty when the paper has no such cell."""
        for names, numbers in self.cells:
            if all(key.get(name) == value for name, value in names.items()):
                return numbers
        return {}


@dataclass(frozen=True)
class PrintedPoint:
    """A point read off a printed figure: of which cell, at which x, and how well it could be read."""

    names: dict[str, Scalar]
    x: str
    at: float
    value: float
    plus_minus: float


def duration(text: str) -> float:
    """Seconds in a printed duration such as "3h40m"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration such as 3h40m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def place(table: str) -> str:
    """A table's key in words: "supplement_table1" is "supplement, Table 1", "figure1" "Figure 1"."""
    supplement, kind, number = re.fullmatch(r"(supplement_)?(table|figure)(.+)", table).groups()
    return f"{'supplement, ' if supplement else ''}{kind.capitalize()} {number}"


def load_published(root: Path, spec: Spec) -> PublishedTable | None:
    """The printed table that `spec` answers to, or None when it answers to none.

    Raises:
        ConfigError: the spec names a paper or table that `root` does not hold.
    """
    if spec.published is None:
        return None
    node, table = _find(root, spec, spec.published, "tables")
    return _table(spec.published[1], table, node.text("citation"))


def load_printed(root: Path, spec: Spec) -> dict[str, tuple[PrintedPoint, ...]]:
    """The points that papers print of the figures of `spec`, by the figure's name.

    Raises:
        ConfigError: a figure names a paper or a printed figure that `root` does not hold.
    """
    found = {}
    for drawing in spec.figures:
        if drawing.published is not None:
            _, figure = _find(root, spec, drawing.published, "figures")
            found[drawing.name] = tuple(_point(point, drawing.y) for point in figure["points"])
    return {name: tuple(point for point in points if point) for name, points in found.items()}


def _find(root: Path, spec: Spec, wanted: tuple[str, str], kind: str) -> tuple[Node, dict]:
    """The paper's file, and one of its `tables` or `figures`."""
    paper, name = wanted
    found = []
    for path in sorted(Path(root).glob("*.yaml")):
        node = read_yaml(path)
        found.append(node.text("paper"))
        if found[-1] == paper:
            printed = node.scalars(kind, {})
            if name not in printed:
                raise node.error(kind, f"has no {name!r}, which {spec.path} names", printed)
            return node, printed[name]
    raise read_yaml(spec.path).error("published", f"names the paper {paper!r}", found)


def _point(point: dict, metric: str) -> PrintedPoint | None:
    """A printed point, or None when it is of another metric (ours on test may answer to the paper's on validation)."""
    numbers = ("metric", "x", "at", "value", "plus_minus")
    if point.get("metric", metric).partition("_")[2] != metric.partition("_")[2]:
        return None
    names = {key: value for key, value in point.items() if key not in numbers}
    return PrintedPoint(names, point["x"], float(point["at"]), float(point["value"]), float(point["plus_minus"]))


def _table(name: str, table: dict, citation: str) -> PublishedTable:
    cells = []
    for cell in table["cells"]:
        numbers = {key: value for key, value in cell.items() if key.endswith(VALUES)}
        names = {key: value for key, value in cell.items() if key not in numbers}
        numbers = {key: duration(value) if isinstance(value, str) else float(value) for key, value in numbers.items()}
        cells.append((names, numbers))
    return PublishedTable(citation, place(name), table["title"], table.get("note", ""), tuple(cells))
