"""The numbers printed in the papers: `results/published/<paper>.yaml`."""

import re
from dataclasses import dataclass
from pathlib import Path

from koala.tables.reader import read_yaml
from koala.tables.spec import Scalar, Spec

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


def duration(text: str) -> float:
    """Seconds in a printed duration such as "3h40m"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration such as 3h40m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def place(table: str) -> str:
    """A table's key in words: "supplement_table1" is "supplement, Table 1"."""
    supplement, _, number = table.rpartition("table")
    return f"{'supplement, ' if supplement else ''}Table {number}"


def load_published(root: Path, spec: Spec) -> PublishedTable | None:
    """The printed table that `spec` answers to, or None when it answers to none.

    Raises:
        ConfigError: the spec names a paper or table that `root` does not hold.
    """
    if spec.published is None:
        return None
    paper, table = spec.published
    found = []
    for path in sorted(Path(root).glob("*.yaml")):
        node = read_yaml(path)
        found.append(node.text("paper"))
        if found[-1] == paper:
            tables = node.scalars("tables", {})
            if table not in tables:
                raise node.error("tables", f"has no {table!r}, which {spec.path} names", tables)
            return _table(table, tables[table], node.text("citation"))
    raise read_yaml(spec.path).error("published", f"names the paper {paper!r}", found)


def _table(name: str, table: dict, citation: str) -> PublishedTable:
    cells = []
    for cell in table["cells"]:
        numbers = {key: value for key, value in cell.items() if key.endswith(VALUES)}
        names = {key: value for key, value in cell.items() if key not in numbers}
        numbers = {key: duration(value) if isinstance(value, str) else float(value) for key, value in numbers.items()}
        cells.append((names, numbers))
    return PublishedTable(citation, place(name), table["title"], table.get("note", ""), tuple(cells))
