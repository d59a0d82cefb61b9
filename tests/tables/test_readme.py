"""results/README.md, the page over all tables, and the blocks of README.md."""

import re

import pytest

from koala.errors import ConfigError
from koala.tables.figures import draw
from koala.tables.readme import coverage, fill, overview
from tests.tables.synthetic import SGD, TUNED, make_row, make_table, segment
from tests.tables.test_standings import EACH_WINS_ONE, make_rows


@pytest.fixture
def table(tmp_path):
    """SGD is best on digits (1 against 2), KOALA-M on letters (1 against 4), three seeds each."""
    return make_table(tmp_path, make_rows(EACH_WINS_ONE))


def grids(page: str) -> list[list[list[str]]]:
    """The cells of every table of a page in Markdown."""
    blocks, inside = [], False
    for line in page.splitlines():
        if line.startswith("|"):
            blocks += [] if inside else [[]]
            blocks[-1].append([text.strip() for text in line.strip("|").split("|")])
        inside = line.startswith("|")
    return blocks


def test_page_has_standings_then_a_table_a_task_then_what_is_measured(table):
    standing, digits, letters, measured = grids(overview([table]))
    assert standing[0] == ["Optimizer", "Best or tied", "Wins", "Losses", "Typical ratio", "Step cost"]
    assert digits[0] == ["Optimizer", "Digits · Error (%)"] and letters[0] == ["Optimizer", "Letters · Error (%)"]
    assert [row[0] for row in digits[2:]] == ["SGD", "KOALA-M"]
    assert digits[2][1].startswith(r"**1.02 \[") and "paper 5.00" in digits[2][1]
    assert measured[2][:8] == ["[small](tables/small.md)", "A small table", "6", "4", "0", "0", "2", "nobody wrote it"]


def test_each_task_has_its_figures_above_its_numbers(table, tmp_path):
    page = overview([table])
    files = {path.name for _, drawn in draw(table, tmp_path).values() for path in drawn.values()}
    shown = re.findall(r"\(figures/([^)]+)\)", page)
    assert shown == ["small-profiles.svg", "small-curves-digits.svg", "small-curves-letters.svg"] and {*shown} <= files
    assert page.index("small-curves-letters.svg") < page.index("Letters · Error")


def test_a_footnote_of_a_whole_column_stands_in_its_heading(tmp_path):
    rows = make_rows(EACH_WINS_ONE)
    short = [row | {"epochs": 5.0} for row in rows]
    some = [row | ({"epochs": 5.0} if row["cell"]["optim"] == "sgd" else {}) for row in rows]
    every, one = (grids(overview([make_table(tmp_path, each)]))[1] for each in (short, some))
    assert "<sup>" in every[0][1] and not any("<sup>" in row[1] for row in every[2:])
    assert "<sup>" not in one[0][1] and [("<sup>" in row[1]) for row in one[2:]] == [True, False]


def test_page_tells_searched_rates_from_given_ones(table, tmp_path):
    rows = [row | {"point": {"optim.lr": rate}} for row in table.rows for rate in (1, 2)]
    searched, given = overview([make_table(tmp_path, rows, TUNED)]), overview([table])
    assert ("learning rates, 2 or more" in searched, "recipes" in searched) == (True, False)
    assert ("learning rates," in given, "recipes" in given) == (False, True)


def test_doubtful_cells_are_shown_with_their_doubt_but_not_compared(tmp_path):
    doubtful = {"segments": [segment(git={"commit": None, "dirty": None})]}
    page = overview([make_table(tmp_path, make_rows(EACH_WINS_ONE, **doubtful))])
    assert "unknown commit behind a run" in page and "Best or tied" not in page
    assert not any("**1.02" in line or "≈ 1.02" in line for line in page.splitlines())


def test_coverage_tells_blocked_runnable_and_measured_apart(table, tmp_path):
    counts = lambda table: [value for value in coverage(table).values() if isinstance(value, int)]  # noqa: E731
    assert counts(table) == [6, 4, 0, 0, 2]
    assert counts(make_table(tmp_path, table.rows[1:])) == [6, 3, 1, 1, 2]  # fewer seeds: measured in part
    short = [row | ({"epochs": 5.0} if row["cell"]["optim"] == "sgd" else {}) for row in table.rows]
    assert counts(make_table(tmp_path, short)) == [6, 2, 2, 2, 2]
    odd = {"config": table.rows[0]["config"] | {"data": {"name": "elsewhere"}}}
    other = [row | (odd if row["cell"]["data"] == "digits" else {}) for row in table.rows]
    assert counts(make_table(tmp_path, other)) == [6, 2, 2, 2, 2]  # recorded with something else than the cell has


def test_blocks_are_filled_and_the_rest_is_kept(table):
    filled = fill("before\n<!-- results: small error -->\nstale\n<!-- /results -->\nafter\n", [table])
    assert filled.startswith("before\n<!-- results: small error -->\n| Optimizer |")
    assert filled.endswith("<!-- /results -->\nafter\n")
    assert "stale" not in filled and "Magic" not in filled and fill(filled, [table]) == filled


def test_a_block_has_the_means_of_optimizers_down_and_tasks_across(table):
    [[head, _, *rows]] = grids(fill("<!-- results: small error -->\n<!-- /results -->\n", [table]))
    assert head == ["Optimizer", "Digits", "Letters"]
    assert rows == [["SGD", "**1.02**", "4.08"], ["KOALA-M", "2.04", "**1.02**"]]


def test_a_block_tells_medians_from_means(table, tmp_path):
    failed = make_row(SGD, 3, status="diverged")
    rows = [failed if (row["cell"], row["seed"]) == (SGD, 3) else row for row in table.rows]
    block = fill("<!-- results: small error -->\n<!-- /results -->\n", [make_table(tmp_path, rows)])
    assert [line.count("(median)") for line in block.splitlines() if line.startswith("| SGD")] == [1]


def test_a_block_chooses_and_orders_the_values_of_an_axis(table):
    block = "<!-- results: small error data=letters,digits optim=koala-m -->\n<!-- /results -->\n"
    [[head, _, *rows]] = grids(fill(block, [table]))
    assert head == ["Optimizer", "Letters", "Digits"] and rows == [["KOALA-M", "**1.02**", "2.04"]]


@pytest.mark.parametrize(
    "block, value, valid",
    [
        ("small eror", "eror", "error"),
        ("smal error", "smal", "small"),
        ("small error dat=digits", "dat", "data"),
        ("small error data=digit", "digit", "digits"),
    ],
)
def test_a_block_of_what_is_not_there_is_refused(table, block, value, valid):
    with pytest.raises(ConfigError) as caught:
        fill(f"<!-- results: {block} -->\n<!-- /results -->\n", [table])
    assert caught.value.value == value and valid in caught.value.valid


def test_a_block_of_an_empty_table_has_no_rows(tmp_path):
    [grid] = grids(fill("<!-- results: small error -->\n<!-- /results -->\n", [make_table(tmp_path, [])]))
    assert grid == [["Optimizer"], ["---"]]
