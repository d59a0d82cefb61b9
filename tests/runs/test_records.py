"""Records and histories: what is not one is refused in one line, and what is one stays, whoever wrote it."""

import copy
import json
import os
import subprocess
import sys

import pytest

from koala import records
from koala.errors import ConfigError

GIT = {"commit": "a" * 40, "dirty": False}
FIRST = {
    "schema": 1, "name": "digits/mlp/sgd", "config": {"seed": 1}, "config_hash": "0123456789ab", "seed": 1,
    "precision": "fp32", "world_size": 1, "device": "CPU", "versions": {"torch": "2"}, "git": GIT,
    "command": "python train.py", "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00",
    "status": "finished", "error": None, "metrics": {"final": {"test_loss": 1.0, "val_loss": None}, "best": {}},
    "steps": 38, "epochs": 2, "seconds": {"train": 1.5, "eval": 0.5}, "throughput": None,
}  # fmt: skip
SECOND = FIRST | {
    "schema": 2, "ranks": 2, "data": {"name": "digits", "fingerprint": "f" * 16, "revision": None},
    "segments": [{
        "from": 0, "to": 38, "numerics": 1, "versions": {"torch": "2"}, "git": GIT, "device": "CPU", "threads": 1,
        "compile": False, "ranks": 1, "backend": None, "load": [0.5, 1.0], "step_ms": 3.0,
        "seconds": {"start": 1.0, "train": 1.5, "eval": 0.5, "save": 0.1},
    }],
}  # fmt: skip
FAILED = {key: FIRST[key] for key in FIRST if key not in ("metrics", "steps", "epochs", "seconds", "throughput")}
FAILED |= {"status": "failed", "error": "OSError: no"}


@pytest.mark.parametrize("record", [FIRST, SECOND, FAILED, SECOND | {"added later": [1]}])
def test_records_of_both_schemas_are_read_as_they_stand(tmp_path, record):
    records.write_json(tmp_path / records.RECORD, record)
    assert records.read_record(tmp_path) == record


def without(record: dict, *keys: str) -> dict:
    record = copy.deepcopy(record)
    *parents, last = keys
    part = record
    for key in parents:
        part = part[key]
    del part[last]
    return record


NOT_RECORDS = {
    "empty": b"",
    "torn": json.dumps(SECOND).encode()[:-40],
    "a list": b"[]",
    "a number": b"1",
    "not UTF-8": json.dumps(SECOND).encode().replace(b"digits", b"dig\xff\xfe"),
    "nested without end": b"[" * 100_000,
    "zeros, as a crashed disk leaves them": b"\0" * 512,
    "nothing but a status": b'{"schema": 1, "status": "finished"}',
    "a status that is none": json.dumps(SECOND | {"status": ["finished"]}).encode(),
    "a later schema": json.dumps(SECOND | {"schema": 3}).encode(),
    "a schema that is true": json.dumps(SECOND | {"schema": True}).encode(),
    "no metrics": json.dumps(without(FIRST, "metrics")).encode(),
    "metrics that are words": json.dumps(FIRST | {"metrics": {"final": {"test_loss": "low"}, "best": {}}}).encode(),
    "steps that are a word": json.dumps(FIRST | {"steps": "38"}).encode(),
    "a group that is a word": json.dumps(FIRST | {"config": {"optim": "sgd"}}).encode(),
    "schema 2 without ranks": json.dumps(without(SECOND, "ranks")).encode(),
    "a segment without versions": json.dumps(
        SECOND | {"segments": [without(SECOND["segments"][0], "versions")]}
    ).encode(),
}


@pytest.mark.parametrize("content", NOT_RECORDS.values(), ids=NOT_RECORDS.keys())
def test_what_is_no_record_is_refused_in_one_line_with_its_place(tmp_path, content):
    (tmp_path / records.RECORD).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        records.read_record(tmp_path)
    assert caught.value.key.startswith(str(tmp_path / records.RECORD))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def rows(*steps: int) -> list[dict]:
    return [{"epoch": float(step), "step": step, "seconds": 0.1 * step, "train_loss": 1 / step} for step in steps]


def test_a_torn_last_row_is_left_out_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / records.METRICS
    for row in rows(1, 2):
        records.append_row(path, row)
    path.write_bytes(path.read_bytes()[:-1])  # torn just before the end of its line
    records.append_row(path, rows(3)[0])
    assert records.read_history(tmp_path) == rows(1, 2, 3)
    path.write_bytes(path.read_bytes()[:-9])
    assert records.read_history(tmp_path) == rows(1, 2)


HISTORIES = {
    "zeros in the middle": lambda lines: [lines[0], b"\0" * len(lines[1]), lines[2]],
    "a row that is a list": lambda lines: [lines[0], b"[]", lines[2]],
    "a row without its step": lambda lines: [lines[0], b'{"epoch": 2, "seconds": 1}', lines[2]],
    "a row twice": lambda lines: [lines[0], lines[1], lines[1], lines[2]],
    "rows in another order": lambda lines: lines[::-1],
    "not UTF-8": lambda lines: [lines[0].replace(b"loss", b"lo\xff\xff"), *lines[1:]],
}


@pytest.mark.parametrize("damage", HISTORIES.values(), ids=HISTORIES.keys())
def test_a_damaged_history_is_refused_with_file_and_line(tmp_path, damage):
    path = tmp_path / records.METRICS
    records.write_rows(path, rows(1, 2, 3))
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(ConfigError) as caught:
        records.read_history(tmp_path)
    assert caught.value.key.startswith(tuple(f"{path}:{line}" for line in (1, 2, 3)))


def test_terminal_commands_in_what_others_wrote_are_shown_not_obeyed(tmp_path):
    hostile = "\x1b]0;owned\x07\x9b31m \u202etxt.exe\r"
    (tmp_path / records.RECORD).write_text(json.dumps(FIRST | {"name": hostile, hostile: 1}))
    record = records.read_record(tmp_path)
    assert "\\x1b]0;owned\\x07" in record["name"]
    text = json.dumps(list(record.items()), ensure_ascii=False)
    assert not any(mark in text for mark in "\x1b\x07\x9b\u202e\r")


@pytest.mark.extended
def test_rows_are_on_the_disk_when_append_returns(tmp_path):
    """strace is not everywhere, so: Python's audit of the call itself, in a process of its own."""
    script = (
        "import os, sys; seen = []; real = os.fsync\n"
        "os.fsync = lambda fd: (seen.append(os.fstat(fd).st_size), real(fd))\n"
        "from koala import records; records.append_row(sys.argv[1], {'step': 1}); print(seen)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "rows.jsonl"], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == f"[{(tmp_path / 'rows.jsonl').stat().st_size}]", done.stderr
