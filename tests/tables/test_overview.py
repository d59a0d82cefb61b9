"""The page over all tables: which cells count as compared, and what stands over tasks."""

import numpy as np
import pytest

from koala.errors import ConfigError
from koala.tables.overview import coverage, fill, overview
from koala.tables.standings import over_tasks, profiles, tasks
from tests.tables.synthetic import SPEC, make_row, make_table, segment


def cell(data, optim):
    return {"data": data, "optim": optim}


@pytest.fixture
def table(tmp_path):
    """SGD is best on digits (1 against 2), KOALA-M on letters (1 against 4), three seeds each."""
    errors = {("digits", "sgd"): 1.0, ("digits", "koala-m"): 2.0, ("letters", "sgd"): 4.0, ("letters", "koala-m"): 1.0}
    return make_table(tmp_path, [make_row(cell(*key), seed, error * (1 + seed / 100))
                                 for key, error in errors.items() for seed in (-1, 0, 1)])  # fmt: skip


def test_every_group_is_a_task_and_the_page_shows_it(table, tmp_path):
    found = tasks([table])
    assert [sorted(task.samples) for task in found] == [["koala-m", "sgd"]] * 2
    page = overview([table])
    assert "**1.00 \\[0.98, 1.02\\] (3)**<br>published 5.00" in page
    assert "![Performance profiles over 2 tasks](../small-profiles.svg)" in over_tasks(table, tmp_path, "..")
    assert (tmp_path / "small-profiles.svg").exists()
    assert "| [small](tables/small.md) | A small table | 6 | 4 | 0 | 0 | 2 | nobody wrote it |" in page


def test_performance_profile_is_the_share_of_tasks_within_a_factor_of_the_best(table):
    lines = {line.label: line for line in profiles(tasks([table]), {"sgd": "SGD", "koala-m": "KOALA-M"})}
    at = lambda line, tau: line.y[np.searchsorted(line.x, tau, side="right") - 1]  # noqa: E731
    assert at(lines["SGD"], 1.0) == at(lines["KOALA-M"], 1.0) == 0.5  # each is best on one task
    assert at(lines["KOALA-M"], 2.1) == 1.0 and at(lines["SGD"], 3.9) == 0.5 and lines["SGD"].y[-1] == 1.0


def test_over_tasks_stands_what_the_tables_show(tmp_path):
    """On either task SGD has the better mean (10 against 10.78, p = 0.02), and KOALA-M the better median (9.9)."""
    sgd, more = [0.0, 0.0, 10.0, 20.0, 20.0], [1.0, 1.0, -0.1, 1.0, 1.0]
    rows = [make_row(cell(data, optim), seed, error + (more[seed - 1] if optim == "koala-m" else 0.0))
            for data in ("digits", "letters") for optim in ("sgd", "koala-m") for seed, error in enumerate(sgd, 1)
    ]  # fmt: skip
    table = make_table(tmp_path, rows)
    for task in tasks([table]):
        assert task.entries["sgd"].numbers["error"].best
        assert task.best == "sgd" and task.ahead == {"sgd": [], "koala-m": ["sgd"]}
        assert [task.factor(name) for name in ("sgd", "koala-m")] == pytest.approx([1.0, 1.078])
    page = overview([table])
    assert "- **SGD**: best, or not beyond noise of it, on 2 of 2 tasks" in page
    assert "- **KOALA-M**: best, or not beyond noise of it, on 0 of 2 tasks" in page


def test_tasks_where_more_is_better_are_compared_as_well(table, tmp_path):
    text = SPEC.replace("top1_error_std}", "top1_error_std, scale: -1, offset: 100, better: higher}")
    digits, letters = tasks([make_table(tmp_path, table.evidence, text)])
    assert (digits.best, letters.best) == ("sgd", "koala-m") and digits.ahead["koala-m"] == ["sgd"]
    assert digits.factor("sgd") == 1.0 and digits.factor("koala-m") == pytest.approx(99 / 98)
    page = "\n".join(over_tasks(make_table(tmp_path, table.evidence, text), tmp_path, ""))
    assert "Performance profiles over 2 tasks" in page and "| SGD | – | 0.50 (2) |" in page


def test_a_best_of_zero_is_the_best_and_others_are_no_multiple_of_it(tmp_path):
    rows = [make_row(cell("digits", optim), seed, error) for optim, error in (("sgd", 0.0), ("koala-m", 2.0))
            for seed in (1, 2, 3)]  # fmt: skip
    [task] = tasks([make_table(tmp_path, rows)])
    assert (task.factor("sgd"), task.factor("koala-m")) == (1.0, np.inf)


def test_nobody_is_compared_beside_a_doubtful_neighbour(tmp_path):
    """As in the table, where nothing is marked: it might be the better one."""
    text = SPEC.replace("needs:\n  - {match: {optim: magic}, reason: nobody wrote it}\n", "")
    rows = [make_row(cell("digits", optim), seed, error, segments=[segment(**versions)])
            for optim, error, versions in (("sgd", 1.0, {}), ("koala-m", 2.0, {}), ("magic", 3.0, {"numerics": 7}))
            for seed in (1, 2, 3)]  # fmt: skip
    table = make_table(tmp_path, rows, text)
    [task] = tasks([table])
    assert not any(entry.numbers["error"].best for entry in table.entries) and task.compared == {}


def test_page_says_on_which_tasks_rates_were_searched(table, tmp_path):
    page = overview([table])
    assert "one rate, set beforehand, on small: there recipes are compared" in page
    assert "as many rates" not in page
    text = SPEC.replace("{label: SGD}", "{label: SGD, grid: {optim.lr: [1, 2]}}").replace(
        "{label: KOALA-M}", "{label: KOALA-M, grid: {optim.lr: [1, 2]}}").replace(
        "{label: Magic}", "{label: Magic, grid: {optim.lr: [1, 2]}}") + "choose: val_loss\n"  # fmt: skip
    rows = [row | {"point": {"optim.lr": rate}} for row in table.evidence for rate in (1, 2)]
    page = overview([make_table(tmp_path, rows, text)])
    assert "best of as many rates, chosen on validation, on small." in page and "recipes" not in page


def test_a_profile_of_another_question_has_no_published_value_on_the_page(tmp_path):
    rows = [make_row(cell("digits", optim), 1, profile="smoke", epochs=1) for optim in ("sgd", "koala-m")]
    page = overview([make_table(tmp_path, rows, profile="smoke")])
    assert "4.00 (1)" in page and "published 5.00" not in page


def test_another_variant_of_an_optimizer_has_its_name_in_the_cell(table, tmp_path):
    """The rows of the page are those of configs/optim, under the name that the first table gives them."""
    plain = make_table(tmp_path, table.evidence, SPEC.replace("{label: SGD}", '{label: "SGD, no momentum"}'))
    page = overview([table, plain])
    [sgd] = [line for line in page.splitlines() if line.startswith("| SGD |")]
    assert sgd.count("<br>SGD, no momentum") == 2 and "| SGD, no momentum |" not in page


def test_doubtful_cells_are_shown_but_not_compared(tmp_path):
    rows = [make_row(cell("digits", optim), seed, segments=[segment(git={"commit": None, "dirty": None})])
            for optim in ("sgd", "koala-m") for seed in (1, 2, 3)]  # fmt: skip
    table = make_table(tmp_path, rows)
    assert all(task.samples == {} for task in tasks([table]))
    page = overview([table])
    assert page.count("⚠") == 3 and "beyond noise in" not in page  # the legend and two cells
    assert over_tasks(table, tmp_path, "") == []


def test_coverage_tells_blocked_runnable_and_measured_apart(table):
    assert coverage(table) == (6, 4, 0, 0, 2)


def test_cells_with_fewer_seeds_or_epochs_than_the_full_setting_are_measured_in_part(table, tmp_path):
    fewer = make_table(tmp_path, table.evidence[1:])
    assert coverage(fewer) == (6, 3, 1, 1, 2)
    short = [row | ({"epochs": 5.0} if row["cell"]["optim"] == "sgd" else {}) for row in table.evidence]
    assert coverage(make_table(tmp_path, short)) == (6, 2, 2, 2, 2)


def test_readmes_blocks_are_filled_and_the_rest_is_kept(table):
    text = "before\n<!-- results: small -->\nstale\n<!-- /results -->\nafter\n"
    filled = fill(text, [table])
    assert filled.startswith("before\n<!-- results: small -->\n| Optimizer |")
    assert filled.endswith("<!-- /results -->\nafter\n")
    assert "stale" not in filled and "Magic" not in filled and fill(filled, [table]) == filled


def test_a_block_of_one_metric_has_optimizers_down_and_tasks_across(table):
    filled = fill("<!-- results: small error -->\n<!-- /results -->\n", [table])
    head, _, *rows = [line for line in filled.splitlines() if line.startswith("|")]
    assert [title.strip() for title in head.strip("|").split("|")] == ["Optimizer", "Digits", "Letters"]
    assert [row.split("|")[1].strip() for row in rows] == ["SGD", "KOALA-M"]
    assert [cell.split()[0].strip("*≈ ") for cell in rows[0].split("|")[2:4]] == ["1.00", "4.00"]  # bold, and not
    with pytest.raises(ConfigError, match="small eror -->: no such metric; did you mean error"):
        fill("<!-- results: small eror -->\n<!-- /results -->\n", [table])
    with pytest.raises(ConfigError, match="smal -->: no such table; did you mean small"):
        fill("<!-- results: smal -->\n<!-- /results -->\n", [table])


def test_a_block_of_one_metric_says_what_is_true_of_every_cell_and_may_be_empty(tmp_path):
    block = "<!-- results: small error -->\n<!-- /results -->\n"
    rows = [make_row(cell("digits", optim), seed, segments=[segment(git={"commit": "b" * 40, "dirty": True})])
            for optim in ("sgd", "koala-m") for seed in (1, 2, 3)]  # fmt: skip
    filled = fill(block, [make_table(tmp_path, rows)])
    assert "; every cell: uncommitted changes behind a run" in filled and "<sup>" not in filled
    assert "| Optimizer |\n| --- |\n\n[small]" in fill(block, [make_table(tmp_path, [])])
    busy = [row | {"segments": [segment(git={"commit": None})]} for row in rows[:1]]
    assert "</sup> unknown commit behind a run" in fill(block, [make_table(tmp_path, busy + rows[1:])])


def test_each_optimizer_stands_in_one_line_and_pairs_beyond_noise_are_bold(table, tmp_path):
    page = overview([table])
    for label in ("SGD", "KOALA-M"):  # each wins one of the two tasks; 1 and 4 times the best, 2 and 1 times
        [line] = [line for line in page.splitlines() if line.startswith(f"- **{label}**")]
        assert "on 1 of 2 tasks; better beyond noise in 1 of 2 comparisons, worse in 1; typically" in line
    assert "typically 2.50 times" in page and "typically 1.50 times" in page
    assert page.index("typically 2.50 times") < page.index("| Optimizer |")  # who stands where comes first
    page = "\n".join(over_tasks(table, tmp_path, ""))
    assert "| SGD | – | 0.50 (2) |" in page  # sure to win one and to lose the other
    [digits] = tasks([make_table(tmp_path, table.evidence[:6])])
    assert digits.best == "sgd" and digits.ahead == {"sgd": [], "koala-m": ["sgd"]}


@pytest.mark.parametrize("koala", ["finished", "diverged"])
def test_a_failure_is_level_with_nobody(tmp_path, koala):
    """Three failures against three successes, or three others, are not beyond noise: the tables do not mark them."""
    table = make_table(tmp_path, [make_row(cell(data, optim), seed, status="diverged" if optim == "sgd" else koala)
                                  for data in ("digits", "letters") for optim in ("sgd", "koala-m")
                                  for seed in (1, 2, 3)])  # fmt: skip
    page = overview([table])
    assert "- **SGD**: best, or not beyond noise of it, on 0 of 2 tasks" in page
    assert f"- **KOALA-M**: best, or not beyond noise of it, on {2 if koala == 'finished' else 0} of 2 tasks" in page


def test_what_is_no_multiple_of_a_best_of_zero_has_not_failed(tmp_path):
    rows = [make_row(cell(data, optim), seed, error) for optim, error in (("sgd", 0.0), ("koala-m", 2.0))
            for data in ("digits", "letters") for seed in (1, 2, 3)]  # fmt: skip
    page = overview([make_table(tmp_path, rows)])
    assert "worse in 0; typically no multiple of a best of 0." in page and "failed on" not in page


def test_a_filter_that_is_behind_is_said_to_be_with_what_it_did(table, tmp_path):
    """Its history has R 2, P11 4 and lr 0.5 throughout; the loss is what the rate takes from it."""
    history = [{"epoch": e, "step": e, "seconds": e, "lr": 0.5, "test_top1_error": 2.0, "train_loss": loss,
                "filter_R": 2.0, "filter_P11": 4.0} for e, loss in ((1, 3.0), (2, 2.0), (3, 1.0))]  # fmt: skip
    rows = [row | ({"history": history} if row["cell"]["optim"] == "koala-m" else {}) for row in table.evidence]
    rows = [row | ({"history": [{"epoch": 1, "step": 1, "seconds": 1}]} if row["cell"]["optim"] == "sgd" else {})
            for row in rows]  # fmt: skip
    page = "\n".join(over_tasks(make_table(tmp_path, rows), tmp_path, ""))
    [line] = [line for line in page.splitlines() if "→" in line and line.startswith("|")]
    assert "Digits" in line and "| KOALA-M | as it comes | SGD | 2 → 2 → 2 | 4 → 4 → 4 | 3 → 2 → 1 |" in line
