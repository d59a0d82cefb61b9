"""How optimizers stand over tasks: who is compared, who wins, by how much."""

import numpy as np
import pytest

from koala.tables.figures import figures, profiles
from koala.tables.standings import comparable, over_tasks, standings, tasks
from tests.tables.synthetic import SPEC, make_row, make_table, segment

HIGHER = SPEC.replace("top1_error_std}", "top1_error_std, scale: -1, offset: 100, better: higher}")


def cell(data, optim):
    return {"data": data, "optim": optim}


def make_rows(errors: dict, seeds=(1, 2, 3), **fields) -> list[dict]:
    """Rows of {(data, optim): error}, the same for every seed but for a percent of it."""
    return [make_row(cell(*key), seed, error * (1 + seed / 100), **fields) for key, error in errors.items()
            for seed in seeds]  # fmt: skip


EACH_WINS_ONE = {("digits", "sgd"): 1, ("digits", "koala-m"): 2, ("letters", "sgd"): 4, ("letters", "koala-m"): 1}


@pytest.fixture
def table(tmp_path):
    """SGD is best on digits (1 against 2), KOALA-M on letters (1 against 4), three seeds each."""
    return make_table(tmp_path, make_rows(EACH_WINS_ONE))


def row(table, label) -> dict:
    """An optimizer's standing."""
    found = standings(table)
    return found[found["Optimizer"] == label].iloc[0].to_dict()


def test_every_group_is_a_task(table):
    assert [sorted(task.numbers) for task in tasks(table)] == [["koala-m", "sgd"]] * 2
    assert [figure.name for figure in figures(table)] == ["curves", "profiles"]


def test_each_optimizer_stands_in_one_row(table, tmp_path):
    """Each wins one of two tasks: 1 and 4 times the best number, 2 and 1 times."""
    for label, ratio in (("SGD", "2.50"), ("KOALA-M", "1.50")):
        assert row(table, label) == {"Optimizer": label, "Best or tied": "1 of 2", "Wins": "1 of 2",
                                     "Losses": "1 of 2", "Typical ratio": ratio, "Step cost": ""}  # fmt: skip
    one = make_table(tmp_path, make_rows({key: EACH_WINS_ONE[key] for key in EACH_WINS_ONE if key[0] == "digits"}))
    assert comparable(one) == [] and over_tasks(one) == []  # one task is no standing


def test_standings_name_the_number_of_each_task(tmp_path):
    labels = "{data: {digits: Error of digits, letters: Error of letters}}"
    text = SPEC.replace("label: Error (%)", f"label: {labels}")
    page = over_tasks(make_table(tmp_path, make_rows(EACH_WINS_ONE), text))
    assert any(line.startswith("By Error of digits or Error of letters.") for line in page)


def test_performance_profile_is_the_share_of_tasks_within_a_factor_of_the_best(table):
    lines = {line.label: line for line in profiles(tasks(table))}
    at = lambda line, tau: line.y[np.searchsorted(line.x, tau, side="right") - 1]  # noqa: E731
    assert at(lines["SGD"], 1.0) == at(lines["KOALA-M"], 1.0) == 0.5  # each is best on one task
    assert at(lines["KOALA-M"], 2.1) == 1.0 and at(lines["SGD"], 3.9) == 0.5 and lines["SGD"].y[-1] == 1.0


def test_standings_agree_with_the_marks_of_the_table(tmp_path):
    """On either task SGD has the better mean (10 against 10.78, p = 0.02), and KOALA-M the better median (9.9)."""
    sgd, more = [0.0, 0.0, 10.0, 20.0, 20.0], [1.0, 1.0, -0.1, 1.0, 1.0]
    rows = [make_row(cell(data, optim), seed, error + (more[seed - 1] if optim == "koala-m" else 0.0))
            for data in ("digits", "letters") for optim in ("sgd", "koala-m") for seed, error in enumerate(sgd, 1)
    ]  # fmt: skip
    table = make_table(tmp_path, rows)
    for task in tasks(table):
        sgd, koala = task.numbers["sgd"], task.numbers["koala-m"]
        assert sgd.best and (sgd.wins, sgd.losses, koala.wins, koala.losses) == (1, 0, 0, 1)
        assert [task.factor(name) for name in ("sgd", "koala-m")] == pytest.approx([1.0, 1.078])
    assert (row(table, "SGD")["Best or tied"], row(table, "KOALA-M")["Best or tied"]) == ("2 of 2", "0 of 2")


def test_tasks_where_more_is_better_are_compared_as_well(table, tmp_path):
    digits, letters = tasks(make_table(tmp_path, table.rows, HIGHER))
    assert digits.numbers["sgd"].wins == digits.numbers["koala-m"].losses == 1
    assert letters.numbers["koala-m"].wins == letters.numbers["sgd"].losses == 1
    assert digits.factor("sgd") == letters.factor("koala-m") == 1.0
    assert digits.factor("koala-m") == pytest.approx((100 - 1.02) / (100 - 2.04))


@pytest.mark.parametrize("koala", ["finished", "diverged"])
def test_a_failure_is_tied_with_nobody(tmp_path, koala):
    """Three failures against three successes, or three others, are not significant: the tables do not mark them."""
    table = make_table(tmp_path, [make_row(cell(data, optim), seed, status="diverged" if optim == "sgd" else koala)
                                  for data in ("digits", "letters") for optim in ("sgd", "koala-m")
                                  for seed in (1, 2, 3)])  # fmt: skip
    assert (row(table, "SGD")["Best or tied"], row(table, "SGD")["Typical ratio"]) == ("0 of 2", "∞")
    assert row(table, "KOALA-M")["Best or tied"] == ("2 of 2" if koala == "finished" else "0 of 2")


def test_a_best_of_zero_is_the_best_and_others_are_no_multiple_of_it(tmp_path):
    table = make_table(tmp_path, make_rows({key: 2.0 * (key[1] == "koala-m") for key in EACH_WINS_ONE}))
    assert [tasks(table)[0].factor(name) for name in ("sgd", "koala-m")] == [1.0, np.inf]
    assert row(table, "KOALA-M")["Typical ratio"] == "∞"


@pytest.mark.parametrize("versions", [{"numerics": 7}, {"git": {"commit": None, "dirty": None}}])
def test_nobody_is_compared_beside_a_doubtful_neighbour(tmp_path, versions):
    """As in the table, where nothing is marked: it might be the better one."""
    text = SPEC.replace("needs:\n  - {match: {optim: magic}, reason: nobody wrote it}\n", "")
    rows = make_rows({("digits", "sgd"): 1.0, ("digits", "koala-m"): 2.0})
    rows += make_rows({("digits", "magic"): 3.0}, segments=[segment(**versions)])
    table = make_table(tmp_path, rows, text)
    [task] = tasks(table)
    assert not any(entry.numbers["error"].best for entry in table.entries) and task.numbers == {}
