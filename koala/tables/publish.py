"""Writes tables, figures and the page to files: from records alone, nothing is run."""

import difflib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from koala.records import write_atomically
from koala.tables import render
from koala.tables.build import Table, build
from koala.tables.figures import Figure, draw
from koala.tables.load import find_specs, load_spec
from koala.tables.measured import read_measured
from koala.tables.overview import fill, overview
from koala.tables.page import page
from koala.tables.published import load_printed, load_published
from koala.tables.spec import FULL
from koala.tables.standings import over_tasks

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS, PUBLISHED = ROOT / "experiments", ROOT / "results" / "published"
FORMATS = ("markdown", "latex", "csv", "html", "figures")
WRITERS = {"markdown": (".md", None), "latex": (".tex", render.latex), "csv": (".csv", render.as_csv)}


@dataclass(frozen=True)
class Places:
    """Where things are read from and written to.

    `overview`: whether a page over all tables, README.md, stands above `tables`; without it, nothing is left out.
    """

    measured: Path
    tables: Path
    figures: Path
    overview: bool = False

    @classmethod
    def below(cls, root: Path) -> "Places":
        """`measured`, `tables` and `figures` below one folder, as in results/."""
        return cls(root / "measured", root / "tables", root / "figures")


def load_tables(names: Iterable[str], measured: Path, profile: str | None = None) -> list[Table]:
    """Builds the named tables (all when none is named) from the rows in `measured`.

    Without a profile each table takes the first of its file that has been measured, or `full`.

    Raises:
        ConfigError: an unknown table or profile, or a fault in a file.
    """
    tables = []
    for name in names or find_specs(EXPERIMENTS):
        spec = load_spec(EXPERIMENTS, name)
        rows = read_measured(measured, name)
        there = {row["profile"] for row in rows}
        chosen = profile or next((name for name, known in spec.profiles.items() if there & spec.read_by(known)), FULL)
        published, printed = load_published(PUBLISHED, spec), load_printed(PUBLISHED, spec)
        tables.append(build(spec, spec.profile(chosen), rows, published, printed))
    return tables


def publish(tables: list[Table], places: Places, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Writes every table in every format; returns the files written, the page (`index.html`) last."""
    with tempfile.TemporaryDirectory() as folder:  # of pictures that only the page has, within itself
        return _publish(tables, places, tuple(formats), Path(folder))


def _publish(tables: list[Table], places: Places, formats: tuple[str, ...], folder: Path) -> list[Path]:
    written: list[Path] = []
    figures: dict[str, list[Figure]] = {}
    for table in tables:
        name = table.spec.name
        if places.overview and not table.measured:
            continue  # the overview says what it would be
        if "figures" in formats or "html" in formats:
            figures[name] = draw(table, places.figures, internals=folder if "html" in formats else None)
            written += [figure.path for figure in figures[name] if not figure.internal]
        for format in formats:
            if format not in WRITERS:
                continue
            suffix, writer = WRITERS[format]
            path = places.tables / f"{name}{suffix}"
            if writer:
                _write(path, writer(table))
            else:
                drawn = [figure for figure in figures.get(name, []) if not figure.internal]
                links = [(figure.caption, _relative(figure.path, path.parent)) for figure in drawn]
                standing = over_tasks(table, places.figures, _relative(places.figures, path.parent))
                _write(path, render.markdown(table, links, standing))
            written.append(path)
    if places.overview:
        path = places.tables.parent / "README.md"
        _write(path, overview(tables))
        written.append(path)
    if "html" in formats:
        path = places.tables / "index.html"
        _write(path, page(tables, figures))
        written.append(path)
    return written


def update_readme(readme: Path, tables: list[Table], write: bool) -> str:
    """Fills the blocks `<!-- results: TABLE -->` of `readme`, if `write`; returns what that changes, as a diff.

    Raises:
        ConfigError: a block names what is not among `tables`.
    """
    before = readme.read_text(encoding="utf-8")
    after = fill(before, tables)
    if write and after != before:
        _write(readme, after)
    return "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), readme.name, readme.name))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()
