"""Measured runs as rows: a record, its history, and the cell of the table it belongs to.

`results/measured/<table>.jsonl` holds one row a run and only ever grows. A row is the record as `koala.records` wrote
it plus `table`, `profile`, `cell`, `point` (its place in the cell's grid, empty without one), `history`, and `timing`
where one command of scripts/reproduce.py ran it from start to end: that command, and how many runs it had at a time.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from koala.records import ENDED, append_row, check_record, read_rows


def row_of(table: str, profile: str, cell: dict, point: dict, record: dict) -> dict:
    """The row for a run (its record with `history`) that stands in `cell` at grid point `point`."""
    return {"table": table, "profile": profile, "cell": cell, "point": point, **record}


def identity(row: dict) -> str:
    """What makes two rows measurements of the same thing: a later one takes the place of an earlier one, also when the
    experiment, or what names a configuration, has changed in between."""
    names = ("table", "profile", "cell", "point", "seed")
    return json.dumps([row[name] for name in names], sort_keys=True)


def measured_path(root: Path, table: str) -> Path:
    """Where the rows of `table` are kept."""
    return Path(root) / f"{table}.jsonl"


def read_measured(root: Path, table: str) -> list[dict]:
    """The rows of `table`, one a run: a run measured again counts as it was measured last.

    Raises:
        ConfigError: a row is no record (names file, line and key).
    """
    path = measured_path(root, table)
    rows = [check_record(row, f"{path}:{number}") for number, row in enumerate(read_rows(path), 1)]
    return list({identity(row): row for row in rows}.values())


def collect(root: Path, rows: Iterable[dict]) -> int:
    """Appends the finished rows that are not there yet, each to its table's file; returns how many.

    A run measured again (same identity, other finishing time) is appended too: nothing is ever rewritten.
    """
    seen: dict[str, set] = {}
    added = 0
    for row in rows:
        if row["status"] not in ENDED:
            continue
        path = measured_path(root, row["table"])
        if row["table"] not in seen:
            seen[row["table"]] = {(identity(old), old["finished"]) for old in read_rows(path)}
        mark = (identity(row), row["finished"])
        if mark not in seen[row["table"]]:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_row(path, row)
            seen[row["table"]].add(mark)
            added += 1
    return added
