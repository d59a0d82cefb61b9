"""Writes tables, figures and the page to files: from records alone, nothing is run."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from koala.records import write_atomically
from koala.tables import render
from koala.tables.build import Table, build
from koala.tables.figures import Figure, draw
from koala.tables.load import find_specs, load_spec
from koala.tables.measured import read_measured
from koala.tables.page import page
from koala.tables.published import load_published
from koala.tables.spec import FULL

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS, PUBLISHED = ROOT / "experiments", ROOT / "results" / "published"
FORMATS = ("markdown", "latex", "csv", "html", "figures")
WRITERS = {"markdown": (".md", None), "latex": (".tex", render.latex), "csv": (".csv", render.as_csv)}


@dataclass(frozen=True)
class Places:
    """Where things are read from and written to."""

    measured: Path
    tables: Path
    figures: Path

    @classmethod
    def below(cls, root: Path) -> "Places":
        """`measured`, `tables` and `figures` below one folder, as in results/."""
        return cls(root / "measured", root / "tables", root / "figures")


def load_tables(
    names: Iterable[str], measured: Path, profile: str | None = None, code: str | None = None
) -> list[Table]:
    """Builds the named tables (all when none is named) from the rows in `measured`.

    Without a profile each table takes the first of its file that has been measured, or `full`. Rows of another `code`
    than this are marked as older; the present code unless given.

    Raises:
        ConfigError: an unknown table or profile, or a fault in a file.
    """
    tables = []
    for name in names or find_specs(EXPERIMENTS):
        spec = load_spec(EXPERIMENTS, name)
        rows = read_measured(measured, name)
        there = {row["profile"] for row in rows}
        chosen = profile or next((known for known in spec.profiles if known in there), FULL)
        tables.append(build(spec, spec.profile(chosen), rows, load_published(PUBLISHED, spec), code))
    return tables


def publish(tables: list[Table], places: Places, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Writes every table in every format; returns the files written, the page (`index.html`) last."""
    formats, written = tuple(formats), []
    figures: dict[str, list[Figure]] = {}
    for table in tables:
        name = table.spec.name
        if "figures" in formats or "html" in formats:
            figures[name] = draw(table, places.figures)
            written += [figure.path for figure in figures[name]]
        for format in formats:
            if format not in WRITERS:
                continue
            suffix, writer = WRITERS[format]
            path = places.tables / f"{name}{suffix}"
            if writer:
                _write(path, writer(table))
            else:
                links = [(figure.caption, _relative(figure.path, path.parent)) for figure in figures.get(name, [])]
                _write(path, render.markdown(table, links))
            written.append(path)
    if "html" in formats:
        path = places.tables / "index.html"
        _write(path, page(tables, figures))
        written.append(path)
    return written


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()
