"""The numbers printed in the papers: `results/published/<paper>.yaml`."""

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from koala.tables.experiment import Experiment
from koala.tables.parts import Key, one_of, read_yaml


@dataclass(frozen=True)
class Published:
    """What papers print for an experiment: the table's source and cells (by the axes' names), and points of figures.

    `points` has, by figure of the experiment, those of its own metric (ours on test may answer to the paper's on
    validation): of which cell, at which x, the value read off, and how well it could be read.
    """

    source: str = ""
    cells: list[tuple[Key, Key]] = field(default_factory=list)
    points: dict[str, list[Key]] = field(default_factory=dict)

    def number(self, key: Key, name: str | None) -> float | None:
        """The number `name` of the printed cell whose every name is in `key`, a duration in seconds; None without."""
        value = next((numbers for names, numbers in self.cells if names.items() <= key.items()), {}).get(name)
        return pd.Timedelta(value).total_seconds() if isinstance(value, str) else value and float(value)


def load_published(root: Path, experiment: Experiment) -> Published:
    """What the papers below `root` print for `experiment`.

    Raises:
        ConfigError: the experiment names a paper, or a table or figure of it, that `root` does not hold.
    """
    points = {}
    for name, figure in experiment.figures.items():
        if figure.published:
            metric = figure.y.partition("_")[2]
            _, printed = _find(root, experiment, figure.published, "figures")
            points[name] = [at for at in printed["points"] if at.get("metric", figure.y).partition("_")[2] == metric]
    if experiment.published is None:
        return Published(points=points)
    paper, table = _find(root, experiment, experiment.published, "tables")
    axes = {name for key in experiment.keys() for name in experiment.published_key(key)}
    cells = [({name: cell[name] for name in cell.keys() & axes}, cell) for cell in table["cells"]]
    where = re.sub("(table|figure)", lambda kind: f"{kind[0].capitalize()} ", experiment.published[1])
    source = f"{paper['citation']}, {where.replace('supplement_', 'supplement, ')}."
    note = table.get("note", "")
    return Published(source + (f" {note[0].upper()}{note[1:]}." if note else ""), cells, points)


def _find(root: Path, experiment: Experiment, wanted: tuple[str, str], kind: str) -> tuple[dict, dict]:
    """The paper's file, and one of its `tables` or `figures`."""
    papers, (paper, name) = _papers(root), wanted
    one_of(f"{experiment.path}: published", paper, papers)
    one_of(f"{experiment.path}: published", name, printed := papers[paper].get(kind, {}))
    return papers[paper], printed[name]


@functools.cache
def _papers(root: Path) -> dict[str, dict]:
    return {values["paper"]: values for values in map(read_yaml, sorted(Path(root).glob("*.yaml")))}
