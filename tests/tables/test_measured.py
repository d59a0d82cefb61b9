"""The append-only store of measured rows."""

import gzip
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from koala.errors import ConfigError
from koala.tables.measured import collect, read_measured
from tests.tables.synthetic import make_row

CELL = {"data": "digits", "optim": "sgd"}


def test_rows_are_appended_once_and_nothing_is_rewritten(tmp_path):
    rows = [make_row(CELL, 1), make_row(CELL, 2)]
    assert collect(tmp_path, rows) == 2
    before = (tmp_path / "small.jsonl.gz").read_bytes()
    assert collect(tmp_path, rows) == 0 and (tmp_path / "small.jsonl.gz").read_bytes() == before
    again = make_row(CELL, 1, 3.0, finished="2026-02-02T00:00:00+00:00")
    assert collect(tmp_path, [again, make_row(CELL, 3)]) == 2
    assert (tmp_path / "small.jsonl.gz").read_bytes().startswith(before)
    renamed = make_row(CELL, 1, 2.5, finished="2026-03-03T00:00:00+00:00", config_hash="ba9876543210")
    assert collect(tmp_path, [renamed]) == 1
    kept = {row["seed"]: row["metrics"]["final"]["test_top1_error"] for row in read_measured(tmp_path, "small")}
    assert kept == {1: 2.5, 2: 4.0, 3: 4.0}  # seed 1 as measured last


def test_commands_that_collect_at_once_lose_no_row(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda seed: collect(tmp_path, [make_row(CELL, seed)]), range(40))) == 40
    assert {row["seed"] for row in read_measured(tmp_path, "small")} == set(range(40))


def test_unfinished_runs_are_not_evidence(tmp_path):
    assert collect(tmp_path, [make_row(CELL, 1, status="failed")]) == 0
    assert read_measured(tmp_path, "small") == []
    assert collect(tmp_path, [make_row(CELL, 1, status="diverged")]) == 1


def test_rows_are_lines_to_zcat_and_a_broken_file_is_named(tmp_path):
    for seed in (1, 2):  # two members
        collect(tmp_path, [make_row(CELL, seed)])
    path = tmp_path / "small.jsonl.gz"
    assert subprocess.run(["zcat", path], capture_output=True, text=True).stdout.count('"table": "small"') == 2
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="small.jsonl.gz"):
        read_measured(tmp_path, "small")


WHOLE = make_row(CELL, 1)


@pytest.mark.parametrize(
    "row, said",
    [
        (3, ".*valid dictionary"),
        ([WHOLE], ".*valid dictionary"),
        *(({name: WHOLE[name] for name in WHOLE if name != key}, f"{key}: Field required")
          for key in ("table", "profile", "cell", "point", "history", "seed", "status", "metrics", "segments")),
        (WHOLE | {"cell": "digits"}, "cell: .*dictionary"),
        (WHOLE | {"status": "failed"}, "status: .*'finished' or 'diverged'"),
        (WHOLE | {"history": [{"epoch": 1.0, "step": 20}]}, "history.0.seconds: Field required"),
        (WHOLE | {"timing": {"command": "c"}}, "timing.jobs: Field required"),
    ],
)  # fmt: skip
def test_row_that_is_none_is_named_by_file_line_and_key(tmp_path, row, said):
    path = tmp_path / "small.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in (WHOLE, row)).encode()))
    with pytest.raises(ConfigError, match=f"small.jsonl.gz:2: {said}"):
        read_measured(tmp_path, "small")
    with pytest.raises(ConfigError, match="small.jsonl.gz:2"):  # nothing is appended to what cannot be read
        collect(tmp_path, [make_row(CELL, 2)])
