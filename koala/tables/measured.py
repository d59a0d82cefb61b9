"""Measured runs as rows: a record, its history, and the cell of the table it belongs to.

`results/measured/<table>.jsonl.gz` holds one row a run (zcat shows them) and only ever grows. A row is the record as
`koala.records` wrote it plus `table`, `profile`, `cell`, `point` (its place in the cell's grid, empty without one),
`history`, and `timing` where one command of scripts/reproduce.py ran it from start to end: that command, and how many
runs it had at a time.
"""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NotRequired

import filelock
from typing_extensions import TypedDict

from koala import records
from koala.errors import ConfigError
from koala.records import ENDED, KEEP, check_record, write_atomically
from koala.schema import check


@KEEP
class Timing(TypedDict):
    """The command that ran a run from start to end, and how many runs it had at a time."""

    command: str
    jobs: int


@KEEP
class Measured(TypedDict):
    """What a row has beside its record, which has ended."""

    status: Literal["finished", "diverged"]
    table: str
    profile: str
    cell: dict[str, Any]
    point: dict[str, Any]
    history: list[records.Row]
    timing: NotRequired[Timing]


def row_of(table: str, profile: str, cell: dict, point: dict, record: dict) -> dict:
    """The row of a run (its record with `history`, or a row of it) that stands in `cell` at grid point `point`."""
    return {**record, "table": table, "profile": profile, "cell": cell, "point": point}


def identity(row: dict) -> str:
    """What makes two rows measurements of the same thing: a later one takes the place of an earlier one, also when the
    experiment, or what names a configuration, has changed in between."""
    names = ("table", "profile", "cell", "point", "seed")
    return json.dumps([row[name] for name in names], sort_keys=True)


def measured_path(root: Path, table: str) -> Path:
    """Where the rows of `table` are kept."""
    return Path(root) / f"{table}.jsonl.gz"


def read_all(path: Path) -> list[dict]:
    """Every row of a file, also those that were measured again since; none where there is no file.

    Raises:
        ConfigError: the file cannot be read as rows, or one of them is none (names file, line and key).
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except FileNotFoundError:
        return []
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path}: no file of measured rows: {error}") from None
    for number, row in enumerate(rows, 1):
        check_record(check(Measured, row, f"{path}:{number}: "), f"{path}:{number}")
    return rows


def read_measured(root: Path, table: str) -> list[dict]:
    """The rows of `table`, one a run: a run measured again counts as it was measured last.

    Raises:
        ConfigError: as `read_all`.
    """
    return list({identity(row): row for row in read_all(measured_path(root, table))}.values())


def collect(root: Path, rows: Iterable[dict]) -> int:
    """Appends the finished rows that are not there yet, each to its table's file; returns how many.

    A run measured again (same identity, other finishing time) is appended too: nothing is ever rewritten. Commands that
    collect at the same time wait for one another.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(Path(root) / ".lock"):
        return _append(root, rows)


def _append(root: Path, rows: Iterable[dict]) -> int:
    added: dict[str, list[dict]] = {}
    seen: dict[str, set] = {}
    for row in rows:
        if row["status"] not in ENDED:
            continue
        table, mark = row["table"], (identity(row), row["finished"])
        if table not in seen:
            seen[table] = {(identity(old), old["finished"]) for old in read_all(measured_path(root, table))}
        if mark not in seen[table]:
            added.setdefault(table, []).append(row)
            seen[table].add(mark)
    for table, new in added.items():
        path = measured_path(root, table)
        before = path.read_bytes() if path.exists() else b""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in new)
        after = before + gzip.compress(text.encode(), mtime=0)  # a file of several members is one file to gzip
        write_atomically(path, lambda file, after=after: file.write(after))
    return sum(map(len, added.values()))
