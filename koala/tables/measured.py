"""Measured runs as rows: a record, its history, and the cell of the table it belongs to.

`results/measured/<table>/<profile>/<optimizer>.jsonl` holds one line of JSON a run (the file is named by the cell's
last axis). A row is the record as `koala.records` wrote it plus `table`, `profile`, `cell`, `point` (empty without a
grid), `history`, and `timing` where one command of scripts/reproduce.py ran it from start to end.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from koala import records
from koala.errors import ConfigError
from koala.lock import Lock
from koala.records import ENDED, KEEP, RECORD, check_record, write_rows
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


def read_measured(root: Path, table: str) -> list[dict]:
    """All measured rows of a table.

    Raises:
        ConfigError: a file cannot be read as rows, or one of them is none (names file, line and key).
    """
    return [row for path in sorted((Path(root) / table).glob("*/*.jsonl")) for row in read_file(path)]


def read_file(path: Path) -> list[dict]:
    """The rows of one file; raises as `read_measured`."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(path, None, f"is no file of measured rows: {error}") from None
    for number, row in enumerate(rows, 1):
        check_record(check(Measured, row, f"{path}:{number}: "), f"{path}:{number}")
    return rows


def collect(root: Path, rows: Iterable[dict]) -> int:
    """Adds the ended rows that are not there yet, each to its file; returns how many.

    A run measured again takes the place of the row there is, which git still has. Commands that collect at the same
    time wait for one another.
    """
    files: dict[Path, list[dict]] = {}
    for row in rows:
        if row["status"] in ENDED:
            *_, last = row["cell"].values() or [""]
            file = re.sub(r"[^a-zA-Z0-9_.+=-]", "_", str(last)) or "all"
            files.setdefault(Path(root) / row["table"] / row["profile"] / f"{file}.jsonl", []).append(row)
    Path(root).mkdir(parents=True, exist_ok=True)
    added = 0
    with Lock(Path(root) / ".lock"):
        for path, new in files.items():
            kept = {_identity(row): row for row in (read_file(path) if path.exists() else ())}
            newer = {_identity(row): row for row in new if _identity(row) not in kept
                     or row["finished"] > kept[_identity(row)]["finished"]}  # fmt: skip
            if newer:
                write_rows(path, (kept | newer).values())
            added += len(newer)
    return added


def _identity(row: dict) -> tuple:
    """What two measurements of the same run have in common; 1 and 1.0 are one value."""
    return row["seed"], frozenset(row["cell"].items()), frozenset(row["point"].items())


def read_runs(folders: Iterable[Path]) -> list[dict]:
    """The records of all ended runs below `folders`, with their histories.

    Of a run that is there more than once (made again, its folder moved aside) the one that finished last counts.

    Raises:
        ConfigError: no folder, no ended run below them, or a record that is none (names it).
    """
    runs: dict[tuple[str, int], dict] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(folder, None, "is not a folder of runs")
        for path in sorted(folder.rglob(RECORD)):
            record = records.read_record(path.parent)
            run = record["config_hash"], record["seed"]
            if record["status"] in ENDED and (run not in runs or record["finished"] > runs[run]["finished"]):
                runs[run] = {**record, "history": records.read_history(path.parent)}
    if not runs:
        raise ConfigError(" ".join(map(str, folders)), None, f"has no finished run below it (a folder with {RECORD})")
    return list(runs.values())
