"""Reads an offline W&B run back: W&B's own record types, in the LevelDB log framing that it writes them in.

W&B's Python reader of that framing went away in 0.2x; what reads it now is `wandb sync`, which needs a server.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, FRAME = 7, 32768, 7  # bytes: ":W&B" + magic + version; a block; checksum (4), length (2), type (1)
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """What the log of one run holds."""

    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    group: str = ""
    files: Path | None = None  # folder of the run's files (tables, media)


def read_offline_run(folder: Path) -> OfflineRun:
    """The only offline run below ``folder``."""
    (log,) = Path(folder).rglob("run-*.wandb")
    run = OfflineRun(files=log.parent / "files")
    for content in _frames(log.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.group, run.tags = record.run.run_group, list(record.run.tags)
            run.config |= _items(record.run.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
    return run


def _frames(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, content = HEADER, b""
    while position + FRAME <= len(data):
        if (room := BLOCK - position % BLOCK) < FRAME:  # too little for a frame: padding
            position += room
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        content += data[position + FRAME : position + FRAME + length]
        position += FRAME + length
        if kind in (FULL, LAST):
            yield content
            content = b""


def _items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
