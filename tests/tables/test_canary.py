"""Do the committed numbers still come out of the code? One row per optimizer of small tables, its first two epochs.

Training amplifies rounding: another CPU ends 20 steps some tenths of a percent away. So torch's own SGD goes first:
where its row comes out to the last digits, this machine rounds as the one that measured, and every other row must come
out so too; elsewhere the first epoch must come out nearly. A row that does not means that numbers have changed: measure
the tables again, or mend the change.
"""

import math
import shlex

import pytest

from koala.records import read_history
from koala.runs import compose, launch
from koala.tables.age import UNKNOWN, codes, is_of, present
from koala.tables.cli import again
from koala.tables.publish import ROOT, load_tables

EPOCHS, NEARLY = 2, 0.05
TABLES = load_tables(["tuning", "quickstart"], ROOT / "results" / "measured")
FOUND = [(entry.key["optim"], table, entry.rows[0]) for table in TABLES for entry in table.entries if entry.rows]
ROWS = {}  # by optimizer: a row that knows its code, if there is one
for optim, table, row in sorted(FOUND, key=lambda found: UNKNOWN in codes(found[2])):
    ROWS.setdefault(optim, (table, row))


def once_more(row: dict, folder) -> tuple[list[dict], list[dict]]:
    """The row's first epochs as recorded, and as they come out now, without what the clock says."""
    recorded = row["history"][:EPOCHS]
    short = [f"max_steps={recorded[-1]['step']}", f"output_root={folder}", "logger=none"]
    launch(compose([*shlex.split(row["command"])[2:], *short]))
    [run] = folder.glob("digits/*/*/*/seed*")
    drop = lambda rows: [{key: value for key, value in row.items() if key != "seconds"} for row in rows]  # noqa: E731
    return drop(recorded), drop(read_history(run))


def to_the_last_digits(recorded: list[dict], found: list[dict]) -> bool:
    """Whether all that was recorded is found; what is measured in addition by now does not matter."""
    return len(found) == len(recorded) and all(
        math.isclose(new[key], old[key], rel_tol=1e-9, abs_tol=1e-12)
        for old, new in zip(recorded, found, strict=True) for key in old
    )  # fmt: skip


@pytest.fixture(scope="module")
def same_rounding(tmp_path_factory) -> bool:
    """Whether this machine rounds as the one that measured."""
    row = ROWS["sgd"][1]
    return UNKNOWN not in codes(row) and to_the_last_digits(*once_more(row, tmp_path_factory.mktemp("sgd")))


@pytest.mark.parametrize("optim", ROWS)
def test_committed_row_comes_out_of_the_code(optim, same_rounding, tmp_path):
    table, row = ROWS[optim]
    if UNKNOWN in codes(row):
        pytest.skip(f"recorded before records knew their code; {again(table)} measures it again")
    recorded, found = once_more(row, tmp_path)
    older = "" if is_of(row, present()) else " (the code has changed since)"
    advice = f"{optim}: recorded {recorded[0]}, now {found[0]}{older}; {again(table)}"
    assert found[0]["train_loss"] == pytest.approx(recorded[0]["train_loss"], rel=NEARLY), advice
    if same_rounding:
        assert to_the_last_digits(recorded, found), advice
