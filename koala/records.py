"""Records of runs on disk: the truth that tables, figures and W&B are made from.

A run folder holds `record.json` (written once, when the run ends), `metrics.jsonl` (one row an evaluation) and
`checkpoints/`. Everything is written to a temporary file, flushed and renamed, or appended as one whole line, so a
reader never sees half a record whatever kills the writer.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

SCHEMA = 1
RECORD = "record.json"
METRICS = "metrics.jsonl"


def plain(value):
    """`value` as strict JSON knows it: non-finite numbers become None, mapping keys strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomically(path: Path, write) -> None:
    """Calls `write(binary file)` on a temporary neighbour of `path`, flushes it to disk and renames it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append_row(path: Path, row: dict) -> None:
    """Appends `row` to a JSON-lines file as one write of one line."""
    line = json.dumps(plain(row), allow_nan=False) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode())


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Replaces a JSON-lines file, atomically."""
    text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file; a last line torn by a crash is left out.

    Raises:
        ValueError: a line other than the last is not JSON (names file and line).
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
    return rows


def read_record(run_dir: Path) -> dict | None:
    """The record of the run in `run_dir`, or None when there is none.

    Raises:
        ValueError: the record is not JSON or of a schema this version does not know.
    """
    path = Path(run_dir) / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {record.get('schema')!r}; this version reads {SCHEMA}")
    return record


def read_history(run_dir: Path) -> list[dict]:
    """The evaluation rows of the run in `run_dir`, oldest first."""
    return read_rows(Path(run_dir) / METRICS)
