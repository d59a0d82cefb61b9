"""All tables and figures as one HTML file that needs nothing else: no scripts, no network, everything escaped."""

import base64
from pathlib import Path

from koala.tables import layout
from koala.tables.build import Table
from koala.tables.figures import Figure
from koala.tables.metric import Metric
from koala.tables.overview import coverage
from koala.tables.reduce import Number
from koala.tables.render import COMMAND


def page(tables: list[Table], figures: dict[str, list[Figure]], title: str = "Measured and published") -> str:
    """The page for `tables`: those that have an entry in `figures` in full, and how much of each is measured."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    items = [_item(table, figures[table.spec.name]) for table in tables if table.spec.name in figures]
    template = environment.get_template("page.html")
    runs = sum(len(table.evidence) for table in tables)
    return template.render(title=title, command=COMMAND, runs=runs, items=items, evidence_heads=layout.EVIDENCE_HEADS,
        coverage=[(table.spec.name, table.spec.title, *coverage(table)) for table in tables],
    )  # fmt: skip


def _item(table: Table, figures: list[Figure]) -> dict:
    spec, heads, letters = table.spec, layout.columns(table), layout.marks(table)
    rows = []
    for row in layout.rows(table):
        cells = [_cell(number, head.metric, letters) for number, head in zip(row.numbers, heads, strict=True)]
        evidence = layout.ranges([number for entry in row.entries for number in entry.evidence])
        rows.append({"labels": row.labels, "cells": cells, "evidence": evidence})
    return {
        "anchor": spec.name.replace("/", "-").replace("+", "p"),
        "name": spec.name,
        "title": spec.title,
        "caption": spec.caption,
        "profile": table.profile.name,
        "labels": [spec.axis(name).label for name in spec.rows],
        "heads": [(" · ".join(head.heads), head.metric.label) for head in heads],
        "rows": rows,
        "letters": [(letter, mark) for mark, letter in letters.items()],
        "notes": layout.notes(table),
        "figures": [
            {"caption": figure.caption, "source": _source(figure.path), "wide": figure.panels > 1} for figure in figures
        ],
        "evidence": layout.evidence_rows(table),
    }


def _cell(number: Number | None, metric: Metric, letters: dict[str, str]) -> dict | None:
    if number is None:
        return None
    return {
        "text": layout.measured_text(number, metric),
        "none": number.value is None,
        "best": number.best,
        "marks": " ".join(letters[mark] for mark in number.marks),
        "published": layout.published_text(number, metric),
        "published_best": number.published_best,
    }


def _source(svg: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
