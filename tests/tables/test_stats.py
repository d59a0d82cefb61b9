"""What may be called better: synthetic cases of failures, ties and noise, against t tables and scipy's own answers."""

import math

import pytest
from scipy import stats as scipy_stats

from koala.tables.stats import sigmas, significant, summarize
from koala.tables.text import measured_text, published_text
from tests.tables.synthetic import KOALA, SGD, SPEC, make_row, make_table, segment

EPOCHS_TO = SPEC.replace(
    "{label: Error (%), key: test_top1_error, published: top1_error, published_std: top1_error_std}",
    "{label: Epochs to 4.5 %, key: test_top1_error, below: 4.5, unit: epoch, digits: 1}",
)


def cells(tmp_path, sgd, koala, text=SPEC):
    table = make_table(tmp_path, [*sgd, *koala], text)
    return table, table.entry(SGD).numbers["error"], table.entry(KOALA).numbers["error"]


def runs(cell, errors, **fields):
    return [make_row(cell, seed, error, **fields) for seed, error in enumerate(errors, 1)]


def test_interval_of_a_mean_is_students(tmp_path):
    found = summarize([5.0, 6.0, 7.0])
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, from the printed table
    assert (found["statistic"], found["value"], found["std"], found["n"]) == ("mean", 6.0, 1.0, 3)
    assert (found["low"], found["high"]) == pytest.approx((6 - half, 6 + half), rel=1e-6)
    alone = summarize([5.0])
    assert (alone["value"], alone["low"], alone["high"], alone["std"]) == (5.0, None, None, None)


def test_two_runs_have_no_interval():
    """It would reach from -13.6 to 24.6 epochs around 4 and 7, and be of no width at all around 4 and 4."""
    for runs in ([4.0, 7.0], [4.0, 4.0]):
        found = summarize(runs)
        assert (found["low"], found["high"], found["n"]) == (None, None, 2) and found["std"] is not None


def test_one_of_three_reaching_a_target_does_not_beat_three_of_three(tmp_path):
    late = runs(SGD, [4.4, 4.4, 4.4])  # 4.4 * (2 - e / 10) is first below 4.5 in the tenth epoch
    one = runs(KOALA, [2.5, 8.0, 8.0])  # the first seed in the second epoch, the others never
    table, sgd, koala = cells(tmp_path, late, one, EPOCHS_TO)
    assert (sgd.value, sgd.finite, sgd.n) == (10.0, 3, 3)
    assert (koala.value, koala.status, koala.finite, koala.n) == (None, "not reached", 1, 3)
    assert measured_text(koala) == "not reached (2 of 3 failed)"
    assert not koala.best and not koala.tied


def test_two_of_three_reaching_a_target_show_the_median(tmp_path):
    table, sgd, koala = cells(tmp_path, runs(SGD, [4.4] * 3), runs(KOALA, [2.5, 4.0, 8.0]), EPOCHS_TO)
    # 2.5 (2 - e / 10) <= 4.5 in the second epoch, 4 (2 - e / 10) in the ninth (4.4); the third never is
    assert (koala.statistic, koala.value, koala.finite) == ("median", 9.0, 2)
    assert measured_text(koala).endswith("(median, 1 of 3 failed)")
    assert koala.tied and sgd.tied  # the better median, but a failure: nothing to be sure of


def test_one_of_three_not_diverging_does_not_beat_three_of_three(tmp_path):
    lucky = [make_row(KOALA, 1, 1.0), *(make_row(KOALA, seed, status="diverged") for seed in (2, 3))]
    table, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 5.1, 5.2]), lucky)
    assert (koala.value, koala.status, koala.finite) == (None, "diverged", 1)
    assert measured_text(koala) == "diverged (2 of 3 failed)"
    assert "2 of 3 runs diverged" in koala.marks and not koala.best and sgd.tied


def test_best_is_what_is_significantly_better_on_paired_seeds(tmp_path):
    _, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 7.0, 9.0]), runs(KOALA, [4.9, 6.91, 8.89]))
    assert koala.best and not sgd.best  # within the spread of either, but better on every seed by about as much
    _, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 7.0, 9.0]), runs(KOALA, [4.0, 6.0, 8.0]))
    assert koala.tied and sgd.tied  # by just as much, as epochs to a target may be: three such seeds are no proof
    _, sgd, koala = cells(tmp_path, runs(SGD, [5.0] * 5), runs(KOALA, [4.0] * 5))
    assert koala.best  # five are: p = 0.008
    _, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 7.0, 9.0]), runs(KOALA, [3.0, 8.0, 8.5]))
    assert koala.value < sgd.value and koala.tied and sgd.tied and not koala.best


def test_the_lower_mean_is_not_best_where_it_loses_on_every_seed_that_both_have(tmp_path):
    """Seven more seeds put SGD's mean above; on the three that KOALA-M was run with, it is better by 1 each time."""
    _, sgd, koala = cells(tmp_path, runs(SGD, [1.0, 1.2, 1.4, *[9.0] * 7]), runs(KOALA, [2.0, 2.2, 2.4]))
    assert koala.value < sgd.value and not koala.best and not sgd.best


@pytest.mark.parametrize(
    "sgd, koala", [({1: 5.0, 2: 7.0, 3: 9.0}, {4: 1.0, 5: 1.1, 6: 1.2}), ({1: 5.0, 2: 7.0}, {1: 1.0, 2: 3.0})]
)
def test_nothing_is_best_or_tied_without_three_seeds_in_common(tmp_path, sgd, koala):
    rows = [[make_row(cell, *run) for run in errors.items()] for cell, errors in ((SGD, sgd), (KOALA, koala))]
    _, sgd, koala = cells(tmp_path, *rows)
    assert not any((sgd.best, koala.best, sgd.tied, koala.tied))


def test_where_more_is_better_the_highest_is_best_and_a_failure_the_lowest(tmp_path):
    text = SPEC.replace("top1_error_std}", "top1_error_std, scale: -1, offset: 100, better: higher}")
    table, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 7.0, 9.0]), runs(KOALA, [4.9, 6.91, 8.89]), text)
    assert koala.best and koala.value == pytest.approx(93.1) and not sgd.best
    failed = [make_row(SGD, seed, status="diverged") for seed in (1, 2, 3, 4)]
    _, sgd, koala = cells(tmp_path, failed, runs(KOALA, [4.0, 5.0, 6.0, 7.0]), text)
    assert koala.best and sgd.value is None and set(sgd.samples.values()) == {-math.inf}


def test_ties_are_marked(tmp_path):
    table, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 6.0, 7.0]), runs(KOALA, [5.0, 6.0, 7.0]))
    assert sgd.tied and koala.tied and not (sgd.best or koala.best)
    assert measured_text(sgd).startswith("≈ 6.00 [")


def test_what_another_beats_is_not_tied_though_the_best_mean_is_too_noisy_to(tmp_path):
    magic = SGD | {"optim": "magic"}
    text = SPEC.replace("needs:\n  - {match: {optim: magic}, reason: nobody wrote it}\n", "")
    steady = [5.0, 5.1, 5.2, 5.3, 5.4]
    worse = [value + 0.3 + seed / 1000 for seed, value in enumerate(steady)]
    rows = [*runs(SGD, [0.0, 10.0, 2.0, 9.0, 3.0]), *runs(KOALA, steady), *runs(magic, worse)]
    table = make_table(tmp_path, rows, text)
    noisy, steady, worse = (table.entry(cell).numbers["error"] for cell in (SGD, KOALA, magic))
    assert noisy.value < steady.value and noisy.tied and steady.tied and not (worse.tied or worse.best)


def test_a_number_too_large_to_write_is_a_failure(tmp_path):
    """Such as the perplexity of a loss above 709: records have null there."""
    rows = runs(SGD, [4.0, 5.0]) + [make_row(SGD, 3, 9.0)]
    rows[2]["metrics"]["final"]["test_top1_error"] = None
    _, sgd, _ = cells(tmp_path, rows, [])
    assert (sgd.n, sgd.finite, sgd.statistic, sgd.value) == (3, 2, "median", 5.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"segments": [segment(git={"commit": "b" * 40, "dirty": True})]},
        {"segments": [segment(git={"commit": None, "dirty": None})]},
        {"segments": [segment(numerics=7)]},
        {"segments": [segment(), segment(numerics=7)]},
        {"schema": 1, "segments": None},
    ],
)
def test_nothing_is_best_from_doubtful_rows(tmp_path, fields):
    _, sgd, koala = cells(tmp_path, runs(SGD, [5.0, 7.0, 9.0]), runs(KOALA, [4.0, 6.01, 7.99]))
    assert koala.best
    for doubtful in ({"sgd": fields, "koala": {}}, {"sgd": {}, "koala": fields}):
        rows = runs(SGD, [5.0, 7.0, 9.0], **doubtful["sgd"]), runs(KOALA, [4.0, 6.01, 7.99], **doubtful["koala"])
        _, sgd, koala = cells(tmp_path, *rows)
        assert not any((sgd.best, koala.best, sgd.tied, koala.tied))
        assert koala.marks or sgd.marks


def test_ten_seeds_that_reached_no_decision():
    """The numbers that had KOALA-M bold at three seeds: over ten, its difference to SGD is noise."""
    sgd = dict(enumerate([4.1, 5.2, 6.0, 3.9, 5.5, 4.4, 6.3, 5.0, 4.7, 5.2]))
    koala = dict(enumerate([3.5, 6.9, 4.2, 7.1, 4.0, 6.6, 5.8, 3.7, 7.3, 4.0]))
    assert significant(sgd, koala) == significant(koala, sgd) == 0
    interval = scipy_stats.ttest_rel(list(koala.values()), list(sgd.values())).confidence_interval()
    assert interval.low < 0 < interval.high
    sooner = {seed: value - 1 for seed, value in sgd.items()}
    assert significant(sooner, sgd) < 0 < significant(sgd, sooner)


def test_failures_count_against(tmp_path):
    good = {seed: 5.0 + seed / 10 for seed in range(10)}
    failed = dict.fromkeys(range(10), math.inf)
    assert significant(good, failed) < 0 < significant(failed, good)
    assert significant(good, good | {3: math.inf}) == 0  # one seed of ten
    assert significant(failed, failed) == 0
    assert significant(good, dict.fromkeys(range(10), -math.inf)) > 0


@pytest.mark.parametrize("n, beyond", [(3, False), (4, True), (5, True)])
def test_so_many_failures_against_as_many_successes_are_significant(n, beyond):
    """By counting: the failures are the n last of 2 n with probability 1 / C(2 n, n), and twice that on either side."""
    assert (2 / math.comb(2 * n, n) < 0.05) == beyond
    good, failed = dict.fromkeys(range(n), 444.0), dict.fromkeys(range(n), math.inf)
    assert (significant(good, failed) < 0 < significant(failed, good)) == beyond
    assert beyond or significant(good, failed) == 0
    assert significant(good, good | {0: math.inf}) == 0


def test_distance_to_the_published_value_counts_both_spreads(tmp_path):
    table, sgd, _ = cells(tmp_path, runs(SGD, [5.0, 6.0, 7.0]), [])
    # ours 6 (s = 1 over 3), printed 5 (s = 0.5 over 3): sqrt(1/3 + 0.25/3) = 0.6455
    assert sgd.difference == 1.0 and sgd.sigmas == pytest.approx(1 / 0.645497, rel=1e-5)
    assert published_text(sgd) == "5.00 ± 0.50 (+1.00, within)"
    _, sgd, _ = cells(tmp_path, runs(SGD, [6.9, 7.0, 7.1]), [])
    assert published_text(sgd) == "5.00 ± 0.50 (+2.00, 6.8σ)"
    assert sigmas(1.0, None, 1, 0.5, 3) is None
    failed = [*runs(SGD, [5.0, 6.0]), make_row(SGD, 3, status="diverged")]
    _, sgd, _ = cells(tmp_path, failed, [])
    assert published_text(sgd) == "5.00 ± 0.50 (+1.00)"  # of a median: no standard error
