"""Records of runs on disk: the truth that tables, figures and W&B are made from.

A run folder holds `record.json` (written once, when the run ends), `metrics.jsonl` (one row an evaluation) and
`checkpoints/`. Everything is written to a temporary file, flushed and renamed, or appended as one whole line, so a
reader never sees half a record whatever kills the writer. What is read may come from anybody: it is checked against the
types below, and what a terminal or a page would take for a command in it is made visible.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # Python 3.11's own do not carry what pydantic reads

from koala.errors import ConfigError
from koala.public import plain, public
from koala.schema import check

SCHEMA = 2
RECORD = "record.json"
METRICS = "metrics.jsonl"
ENDED = ("finished", "diverged")
KEEP = with_config(ConfigDict(extra="allow", strict=True))  # later versions may write more; numbers are no strings


@KEEP
class Git(TypedDict):
    """The suite's checkout: commit, and whether files differ from it, or the package has ones that git does not
    know; None for both outside git."""

    commit: str | None
    dirty: bool | None


@KEEP
class Data(TypedDict):
    """The data a run saw: name of its config, digest of its content (or hub id), and the hub's commit, None if there is
    no hub or it did not say."""

    name: str
    fingerprint: str
    revision: str | None


@KEEP
class Seconds(TypedDict):
    """Seconds of a segment by phase; `start` holds set-up, compilation and the first step."""

    start: float
    train: float
    eval: float
    save: float


# A part of a run made by one process (or one set of ranks): steps from ..< to, and all that may have rounded it.
Segment = with_config(ConfigDict(extra="allow", strict=True))(
    TypedDict(
        "Segment",
        {
            "from": int,
            "to": int,
            "numerics": NotRequired[int],  # koala.numerics.VERSION; a digest of "sources" in older records
            "versions": dict[str, str],
            "git": Git,
            "device": str,
            "threads": int,
            "compile": bool,
            "ranks": int,  # that were really at work
            "backend": str | None,  # the optimizer's
            "arithmetic": NotRequired[str],  # precision, what of the model is in another, memory layout
            "load": list[float],  # the machine's 1-minute load average at the start and at the end
            "seconds": Seconds,
            "step_ms": float | None,  # median of a step
        },
    )
)


@KEEP
class Config(TypedDict):
    """The run's configuration, of which these are groups of keys."""

    data: NotRequired[dict[str, Any]]
    model: NotRequired[dict[str, Any]]
    optim: NotRequired[dict[str, Any]]


@KEEP
class Opening(TypedDict):
    """A record when the run starts."""

    schema: Literal[1, 2]
    name: str  # data/model/optim
    config: Config
    config_hash: str
    seed: int
    precision: str
    device: str
    versions: dict[str, str]
    git: Git
    command: str
    started: str
    ranks: NotRequired[int]  # 2: what the numbers claim; in the hash
    data: NotRequired[Data]  # 2
    segments: NotRequired[list[Segment]]  # 2


@KEEP
class Metrics(TypedDict):
    """`final`: the last row's values (and the selected weights' test); `best`: {metric: {value, epoch}} over rows."""

    final: dict[str, float | None]
    best: dict[str, Any]


@KEEP
class Ended(Opening):
    """A run that finished or diverged: a result."""

    status: Literal["finished", "diverged"]
    error: str | None
    metrics: Metrics
    steps: int
    epochs: float
    seconds: dict[str, float]  # of each phase, over all segments
    throughput: float | None
    finished: str
    parameters: NotRequired[int]
    state_bytes: NotRequired[int]  # of the optimizer: one entire copy, however sharded


@KEEP
class Failed(Opening):
    """A run that ended in an error; the same command resumes it."""

    status: Literal["failed"]
    error: str
    finished: str


@KEEP
class Row(TypedDict):
    """One evaluation: where, after how many seconds of training; and metrics by name."""

    epoch: float
    step: int
    seconds: float


Record = Ended | Failed


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes `content` to a temporary neighbour of `path`, flushes it to disk and renames it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(public(value), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def append_row(path: Path, row: dict) -> None:
    """Appends `row` to a JSON-lines file as one write of one line, and flushes it to disk."""
    line = (json.dumps(plain(row), allow_nan=False) + "\n").encode()
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was torn by a crash: it must not swallow this one
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Replaces a JSON-lines file, atomically."""
    text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    write_atomically(path, text.encode())


def _decode(content: bytes, name: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(name, None, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(name, None, f"is not a JSON object but {type(value).__name__}")
    return plain(value)


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file; a last line torn by a crash is left out.

    Raises:
        ConfigError: a line other than the last is not a JSON object (names file and line).
    """
    if not os.path.exists(path):
        return []
    lines = Path(path).read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_decode(line, f"{path}:{number}"))
        except ConfigError:
            if number < len(lines):
                raise
    return rows


def read_record(run_dir: Path) -> Record | None:
    """The record of the run in `run_dir`, or None when there is none; schema 1 or 2.

    Raises:
        ConfigError: the record is not JSON, of a schema this version does not know, or lacks what a record has.
    """
    path = Path(run_dir) / RECORD
    if not os.path.exists(path):
        return None
    record = _decode(path.read_bytes(), str(path))
    schema = record.get("schema")
    if schema not in (1, SCHEMA) or schema is True:
        raise ConfigError(f"{path}: schema", schema, "of a later version", valid=f"1 to {SCHEMA}")
    return check_record(record, str(path))


def check_record(record: dict, name: str) -> Record:
    """`record`, if it is one; `name` of its file, for the message.

    Raises:
        ConfigError: naming the key that is missing or of another type.
    """
    status = record.get("status")
    if status not in (*ENDED, "failed"):
        raise ConfigError(f"{name}: status", status, "is no end of a run", valid=(*ENDED, "failed"))
    if record.get("schema") == SCHEMA:
        if missing := [key for key in ("ranks", "data", "segments") if key not in record]:
            raise ConfigError(f"{name}: {missing[0]}", None, "is missing")
    return check(Ended if status in ENDED else Failed, record, f"{name}: ")


def read_history(run_dir: Path) -> list[dict]:
    """The evaluation rows of the run in `run_dir`, oldest first.

    Raises:
        ConfigError: a line is no row, or the rows' steps do not rise.
    """
    path = Path(run_dir) / METRICS
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        check(Row, row, f"{path}:{number}: ")
        if number > 1 and row["step"] <= rows[number - 2]["step"]:
            raise ConfigError(f"{path}:{number}: step", row["step"], f"follows step {rows[number - 2]['step']}")
    return rows
