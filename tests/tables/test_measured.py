"""The store of measured rows: one line of JSON a run."""

import json
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from koala.errors import ConfigError
from koala.tables.measured import collect, read_measured
from tests.tables.synthetic import make_row

CELL = {"data": "digits", "optim": "sgd"}


FILE = "small/full/sgd.jsonl"


def test_a_run_is_kept_once_as_it_was_measured_last(tmp_path):
    rows = [make_row(CELL, 1), make_row(CELL, 2)]
    assert collect(tmp_path, rows) == 2
    before = (tmp_path / FILE).read_text()
    assert collect(tmp_path, rows) == 0 and (tmp_path / FILE).read_text() == before
    again = make_row(CELL, 1, 3.0, finished="2026-02-02T00:00:00+00:00")
    assert collect(tmp_path, [again, make_row(CELL, 3)]) == 2
    renamed = make_row(CELL, 1, 2.5, finished="2026-03-03T00:00:00+00:00", config_hash="ba9876543210")
    assert collect(tmp_path, [renamed]) == 1
    assert collect(tmp_path, [again]) == 0  # older than what is there
    kept = {row["seed"]: row["metrics"]["final"]["test_top1_error"] for row in read_measured(tmp_path, "small")}
    assert kept == {1: 2.5, 2: 4.0, 3: 4.0}


def test_each_optimizer_and_profile_has_a_file_of_plain_json_lines(tmp_path):
    other = CELL | {"optim": "a/b c"}
    collect(tmp_path, [make_row(CELL), make_row(other), make_row(CELL, profile="smoke")])
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))
    assert files == ["small/full/a_b_c.jsonl", FILE, "small/smoke/sgd.jsonl"]
    [row] = pd.read_json(tmp_path / FILE, lines=True).to_dict("records")
    assert row["cell"] == CELL and pd.DataFrame(row["history"])["epoch"].max() == 10
    assert len(read_measured(tmp_path, "small")) == 3


def test_1_and_1_0_are_one_point(tmp_path):
    older, newer = (make_row(CELL, 1, point={"optim.lr": rate}) for rate in (1, 1.0))
    assert collect(tmp_path, [older]) == 1
    assert collect(tmp_path, [newer | {"finished": "2999-01-01T00:00:00+00:00"}]) == 1
    assert len(read_measured(tmp_path, "small")) == 1


def test_commands_that_collect_at_once_lose_no_row(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda seed: collect(tmp_path, [make_row(CELL, seed)]), range(40))) == 40
    assert {row["seed"] for row in read_measured(tmp_path, "small")} == set(range(40))


def test_unfinished_runs_are_not_evidence(tmp_path):
    assert collect(tmp_path, [make_row(CELL, 1, status="failed")]) == 0
    assert read_measured(tmp_path, "small") == []
    assert collect(tmp_path, [make_row(CELL, 1, status="diverged")]) == 1


WHOLE = make_row(CELL, 1)


@pytest.mark.parametrize(
    "row, key",
    [
        (3, ""),
        ([WHOLE], ""),
        *(({name: WHOLE[name] for name in WHOLE if name != key}, key)
          for key in ("table", "profile", "cell", "point", "history", "seed", "status", "metrics", "segments")),
        (WHOLE | {"cell": "digits"}, "cell"),
        (WHOLE | {"status": "failed"}, "status"),
        (WHOLE | {"history": [{"epoch": 1.0, "step": 20}]}, "history.0.seconds"),
        (WHOLE | {"timing": {"command": "c"}}, "timing.jobs"),
    ],
)  # fmt: skip
def test_row_that_is_none_is_named_by_file_line_and_key(tmp_path, row, key):
    path = tmp_path / FILE
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (WHOLE, row)))
    for refused in (lambda: read_measured(tmp_path, "small"), lambda: collect(tmp_path, [make_row(CELL, 2)])):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value).startswith(f"{path}:2") and key in str(caught.value)


def test_file_that_is_torn_is_named(tmp_path):
    collect(tmp_path, [make_row(CELL, 1)])
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text()[:-9])
    with pytest.raises(ConfigError) as caught:
        read_measured(tmp_path, "small")
    assert caught.value.key == str(tmp_path / FILE)
