"""Numbers of a table against means taken by hand."""

import pytest

from koala.tables import layout
from tests.tables.synthetic import SPEC, make_row, make_table

SGD, KOALA = {"data": "digits", "optim": "sgd"}, {"data": "digits", "optim": "koala-m"}


def number(table, key, metric="error"):
    return table.entry(key).numbers[metric]


def test_mean_std_difference_and_best(tmp_path):
    rows = [make_row(SGD, seed, error) for seed, error in ((1, 5.0), (2, 6.0), (3, 7.0))]
    rows += [make_row(KOALA, seed, 4.5) for seed in (1, 2, 3)]
    table = make_table(tmp_path, rows)
    sgd, koala = number(table, SGD), number(table, KOALA)
    assert (sgd.mean, sgd.std, sgd.n) == (6.0, 1.0, 3)  # deviations -1, 0, 1 over n - 1 = 2
    assert (sgd.published, sgd.published_std, sgd.difference) == (5.0, 0.5, 1.0)
    assert (koala.mean, koala.difference) == (4.5, 0.5)
    assert koala.best and koala.published_best and not sgd.best and not sgd.published_best
    assert sgd.marks == ()


def test_what_is_missing_says_why(tmp_path):
    table = make_table(tmp_path, [make_row(SGD, 1, status="diverged"), make_row(KOALA, 1, profile="smoke")])
    assert number(table, SGD).status == "diverged"
    assert number(table, KOALA).status == "not run"  # its only run is of another profile
    assert number(table, {"data": "digits", "optim": "magic"}).status == "blocked"
    assert number(table, {"data": "letters", "optim": "sgd"}).published is None


@pytest.mark.parametrize(
    "fields, mark",
    [
        ({"epochs": 4}, "4 epochs (paper: 10)"),
        ({"precision": "bf16"}, "bf16 (assumed: fp32)"),
        ({"git": {"commit": "b" * 40, "dirty": True}}, "uncommitted changes behind a run"),
        ({"git": None}, "unknown commit behind a run"),
    ],
)
def test_marks_of_deviating_runs(tmp_path, fields, mark):
    rows = [make_row(SGD, 1), make_row(SGD, 2), make_row(SGD, 3, **fields)]
    assert number(make_table(tmp_path, rows), SGD).marks == (mark,)


def test_fewer_seeds_and_diverged_runs_are_marked_and_left_out_of_the_mean(tmp_path):
    rows = [make_row(SGD, 1, 3.0), make_row(SGD, 2, 99.0, status="diverged")]
    found = number(make_table(tmp_path, rows), SGD)
    assert (found.mean, found.std, found.n) == (3.0, None, 1)
    assert found.marks == ("1 of 2 runs diverged", "n = 2 (paper: 3)")


def test_profile_that_is_not_comparable_has_no_difference(tmp_path):
    found = number(make_table(tmp_path, [make_row(SGD, 1, profile="smoke")], profile="smoke"), SGD)
    assert found.published == 5.0 and found.difference is None
    assert found.marks == ("smoke profile, not the paper's setting",)


METRIC = "error: {label: Error (%), key: test_top1_error, published: top1_error, published_std: top1_error_std}"


@pytest.mark.parametrize(
    "metric, value",
    [
        ("{label: E, key: test_top1_error, at: best}", 2.0),  # the record's best is half its last
        ("{label: E, key: test_top1_error, scale: -1, offset: 100}", 96.0),
        ("{label: E, key: test_top1_error, after_seconds: 5.5}", 6.0),  # fifth second: 4 * (2 - 0.5)
        ("{label: E, key: test_loss, below: 0.75, unit: epoch}", 5.0),  # 1 - 5/20, first at the target
        ("{label: E, key: test_loss, below: 0.75, unit: step}", 100.0),
        ("{label: E, record: seconds.train}", 101.0),
        ("{label: E, record: seconds.train, per: epochs}", 10.1),
    ],
)
def test_where_a_number_comes_from(tmp_path, metric, value):
    table = make_table(tmp_path, [make_row(SGD, 1, 4.0)], SPEC.replace(METRIC, f"error: {metric}"))
    assert number(table, SGD).mean == pytest.approx(value)


@pytest.mark.parametrize(
    "metric, status",
    [
        ("{label: E, key: test_loss, below: 0.1, unit: epoch}", "not reached"),
        ("{label: E, key: test_loss, after_seconds: 0.5}", "not measured"),
        ("{label: E, record: no.such.field}", "not measured"),
    ],
)
def test_number_that_is_not_there(tmp_path, metric, status):
    table = make_table(tmp_path, [make_row(SGD, 1)], SPEC.replace(METRIC, f"error: {metric}"))
    assert number(table, SGD).status == status


def test_target_reached_by_some_is_marked(tmp_path):
    text = SPEC.replace(METRIC, "error: {label: E, key: test_top1_error, below: 4.5, unit: epoch}")
    found = number(make_table(tmp_path, [make_row(SGD, 1, 4.0), make_row(SGD, 2, 8.0)], text), SGD)
    assert (found.mean, found.n) == (9.0, 1)  # 4 * (2 - 9/10) = 4.4
    assert "1 of 2 runs reached it" in found.marks


def test_grid_shows_the_point_with_the_best_validation_not_the_best_test(tmp_path):
    text = SPEC.replace("sgd: {label: SGD}", "sgd: {label: SGD, grid: {optim.lr: [1, 2, 3]}}") + "choose: val_loss\n"
    text = text.replace("{label: KOALA-M}", "{label: KOALA-M, grid: {optim.lr: [1, 2, 3]}}")
    rows = [make_row(SGD, seed, 5.0, val_loss=0.2, point={"optim.lr": 1}) for seed in (1, 2)]
    rows += [make_row(SGD, seed, 1.0, val_loss=0.9, point={"optim.lr": 2}) for seed in (1, 2)]
    rows += [make_row(SGD, 1, 0.5, val_loss=0.1, point={"optim.lr": 3})]
    rows += [make_row(SGD, 2, 0.5, point={"optim.lr": 3}, status="diverged")]  # unstable: behind every stable point
    entry = make_table(tmp_path, rows, text).entry(SGD)
    assert entry.point == {"optim.lr": 1} and entry.numbers["error"].mean == 5.0
    assert [(point["optim.lr"], value) for point, value, _ in entry.tried] == [(1, 0.2), (2, 0.9), (3, None)]
    [note] = [note for note in layout.notes(make_table(tmp_path, rows, text)) if "shown at" in note]
    assert "optim.lr = 1, chosen on val_loss" in note and "3: diverged" in note and "edge of the grid" in note
