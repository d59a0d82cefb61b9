"""Runs as pandas frames."""

import math

import pandas as pd
import pytest

import koala.tables
from koala.errors import ConfigError
from koala.tables.measured import collect
from tests.tables.synthetic import make_row
from tests.tables.test_runs import leave

CELL = {"optim": "sgd"}


def test_a_row_a_run_and_metric_with_what_differs(tmp_path):
    for seed, rate in ((1, 0.1), (2, 0.1), (1, 0.2)):
        leave(tmp_path, "sgd", seed, 4.0 + seed, lr=rate)
    leave(tmp_path, "adam", 1, status="diverged", lr=0.3)
    found = koala.tables.frame(tmp_path)
    errors = found[found["metric"] == "test_top1_error"].set_index(["optimizer", "optim.lr", "seed"])["value"]
    assert errors.to_dict() == {
        ("sgd", 0.1, 1): 5.0,
        ("sgd", 0.1, 2): 6.0,
        ("sgd", 0.2, 1): 5.0,
        ("adam", 0.3, 1): math.inf,
    }
    assert set(found["data"]) == {"digits"} and "optim.name" not in found  # the same in all runs of an optimizer


def test_history_is_a_row_an_evaluation(tmp_path):
    leave(tmp_path, "sgd", 1)
    leave(tmp_path, "sgd", 2)
    found = koala.tables.history(str(tmp_path))
    assert list(found.groupby("seed").size()) == [10, 10] and list(found["epoch"][:10]) == list(range(1, 11))
    pd.testing.assert_series_equal(found["test_loss"], 1 - found["epoch"] / 20, check_names=False)


def test_measured_rows_are_runs_too(tmp_path):
    collect(tmp_path, [make_row(CELL, seed, 4.0 + seed) for seed in (1, 2)])
    found = koala.tables.frame(tmp_path / "small")
    assert sorted(found[found["metric"] == "test_top1_error"]["value"]) == [5.0, 6.0]


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        koala.tables.frame(tmp_path)
    assert caught.value.key == str(tmp_path)
