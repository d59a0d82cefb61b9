"""The page over all tables: which cells count as compared, and what stands over tasks."""

import numpy as np
import pytest

from koala.tables.overview import coverage, fill, overview
from koala.tables.standings import improvement_over_tasks, profiles, tasks
from tests.tables.synthetic import make_row, make_table, segment


def cell(data, optim):
    return {"data": data, "optim": optim}


@pytest.fixture
def table(tmp_path):
    """SGD is best on digits (1 against 2), KOALA-M on letters (1 against 4), three seeds each."""
    errors = {("digits", "sgd"): 1.0, ("digits", "koala-m"): 2.0, ("letters", "sgd"): 4.0, ("letters", "koala-m"): 1.0}
    return make_table(tmp_path, [make_row(cell(*key), seed, error + seed / 100)
                                 for key, error in errors.items() for seed in (-1, 0, 1)])  # fmt: skip


def test_every_group_is_a_task_and_the_page_shows_it(table, tmp_path):
    found = tasks([table])
    assert [sorted(task.samples) for task in found] == [["koala-m", "sgd"]] * 2
    page = overview([table], tmp_path)
    assert "**1.00 \\[0.98, 1.02\\] (3)**<br>published 5.00" in page and "![Performance profiles over 2 tasks]" in page
    assert (tmp_path / "profiles.svg").exists()
    assert "| [small](tables/small.md) | A small table | 6 | 4 | 0 | 0 | 2 | nobody wrote it |" in page


def test_performance_profile_is_the_share_of_tasks_within_a_factor_of_the_best(table):
    lines = {line.label: line for line in profiles(tasks([table]), {"sgd": "SGD", "koala-m": "KOALA-M"})}
    at = lambda line, tau: line.y[np.searchsorted(line.x, tau, side="right") - 1]  # noqa: E731
    assert at(lines["SGD"], 1.0) == at(lines["KOALA-M"], 1.0) == 0.5  # each is best on one task
    assert at(lines["KOALA-M"], 2.1) == 1.0 and at(lines["SGD"], 3.9) == 0.5 and lines["SGD"].y[-1] == 1.0


def test_probability_of_improvement_is_averaged_over_tasks():
    value, low, high = improvement_over_tasks([([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]), ([2.0, 2.0, 2.0], [1.0, 1.0, 3.0])])
    assert value == pytest.approx((1 + 1 / 3) / 2) and low <= value <= high


def test_doubtful_cells_are_shown_but_not_compared(tmp_path):
    rows = [make_row(cell("digits", optim), seed, segments=[segment(sources="0" * 16)])
            for optim in ("sgd", "koala-m") for seed in (1, 2, 3)]  # fmt: skip
    table = make_table(tmp_path, rows)
    assert all(task.samples == {} for task in tasks([table]))
    page = overview([table], tmp_path)
    assert page.count("⚠") == 3 and "Too few tasks" in page  # the legend and two cells


def test_coverage_tells_blocked_runnable_and_measured_apart(table):
    assert coverage(table) == (6, 4, 0, 0, 2)


def test_readmes_blocks_are_filled_and_the_rest_is_kept(table):
    text = "before\n<!-- results: small -->\nold\n<!-- /results -->\nafter\n"
    filled = fill(text, [table])
    assert filled.startswith("before\n<!-- results: small -->\n| Optimizer |")
    assert filled.endswith("<!-- /results -->\nafter\n")
    assert "old" not in filled and "Magic" not in filled and fill(filled, [table]) == filled


def test_each_optimizer_stands_in_one_line_and_pairs_beyond_noise_are_bold(table, tmp_path):
    page = overview([table], tmp_path)
    for label in ("SGD", "KOALA-M"):  # each wins one of the two tasks; 1 and 4 times the best, 2 and 1 times
        [line] = [line for line in page.splitlines() if line.startswith(f"- **{label}**")]
        assert "on 1 of 2 tasks; better beyond noise in 1 of 2 comparisons, worse in 1; typically" in line
    assert "typically 2.50 times" in page and "typically 1.50 times" in page
    assert "| SGD | – | 0.50 (2) |" in page  # sure to win one and to lose the other
    [digits] = tasks([make_table(tmp_path, table.evidence[:6])])
    assert digits.best == "sgd" and digits.ahead == {"sgd": [], "koala-m": ["sgd"]}


def test_a_filter_that_is_behind_is_said_to_be_with_what_it_did(table, tmp_path):
    """Its history has R 2, P11 4 and lr 0.5 throughout; the loss is what the rate takes from it."""
    history = [{"epoch": e, "step": e, "seconds": e, "lr": 0.5, "test_top1_error": 2.0, "train_loss": loss,
                "filter_R": 2.0, "filter_P11": 4.0} for e, loss in ((1, 3.0), (2, 2.0), (3, 1.0))]  # fmt: skip
    rows = [row | ({"history": history} if row["cell"]["optim"] == "koala-m" else {}) for row in table.evidence]
    rows = [row | ({"history": [{"epoch": 1, "step": 1, "seconds": 1}]} if row["cell"]["optim"] == "sgd" else {})
            for row in rows]  # fmt: skip
    page = overview([make_table(tmp_path, rows)], tmp_path)
    [line] = [line for line in page.splitlines() if "→" in line and line.startswith("|")]
    assert "Digits" in line and "| KOALA-M | as it comes | SGD | 2 → 2 → 2 | 4 → 4 → 4 | 3 → 2 → 1 |" in line
