"""Numbers of a table against means taken by hand."""

import pytest

from koala.errors import ConfigError
from koala.tables import text as words
from koala.tables.samples import versions
from koala.tables.table import APART
from tests.tables.synthetic import KOALA, SGD, SPEC, TUNED, VERSIONS, make_row, make_table, segment

ONE = "CPU, 1 threads, 1 ranks, portable, arithmetic not recorded"


def number(table, key, metric="error"):
    return table.entry(key).numbers[metric]


def test_mean_std_difference_and_best(tmp_path):
    rows = [make_row(SGD, seed, error) for seed, error in ((1, 5.0), (2, 6.0), (3, 7.0))]
    rows += [make_row(KOALA, seed, error) for seed, error in ((1, 3.4), (2, 4.5), (3, 5.6))]
    table = make_table(tmp_path, rows)
    sgd, koala = number(table, SGD), number(table, KOALA)
    assert (sgd.value, sgd.std, sgd.n) == (6.0, 1.0, 3)  # deviations -1, 0, 1 over n - 1 = 2
    assert (sgd.published, sgd.published_std, sgd.difference) == (5.0, 0.5, 1.0)
    assert (koala.value, koala.difference) == pytest.approx((4.5, 0.5))
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
        ({"segments": [segment(git={"commit": "b" * 40, "dirty": True})]}, "uncommitted changes behind a run"),
        ({"segments": [segment(git={"commit": None, "dirty": None})]}, "unknown commit behind a run"),
        (
            {"segments": [segment(), segment(threads=2)]},
            f"made on 2 kinds of hardware or arithmetic: {ONE}; {ONE.replace('1 threads', '2 threads')}",
        ),
    ],
)
def test_marks_of_deviating_runs(tmp_path, fields, mark):
    rows = [make_row(SGD, 1), make_row(SGD, 2), make_row(SGD, 3, **fields)]
    assert number(make_table(tmp_path, rows), SGD).marks == (mark,)


def of(**fields) -> dict:
    """Fields of a row that was computed with these."""
    versions = VERSIONS | fields.pop("versions", {})
    return {"segments": [segment(versions=versions, **fields)]}


def test_runs_of_other_versions_than_the_newest_are_marked(tmp_path):
    newest = [make_row(KOALA, seed, finished="2027-01-01T00:00:00+00:00") for seed in (1, 2, 3)]

    def marks(**fields):
        return number(make_table(tmp_path, newest + [make_row(SGD, seed, **fields) for seed in (1, 2, 3)]), SGD).marks

    assert marks() == ()
    assert marks(**of(versions={"torch": "2.15.0+cu130"})) == ()  # another build, which the device says
    assert marks(**of(versions={"timm": "0.1"})) == ()  # which SGD does not use
    assert marks(**of(numerics=2)) == ("computed by numerics 2, others by numerics 1",)
    assert marks(**of(versions={"torch": "1.0"})) == ("computed by torch 1.0, others by torch 2.15.0",)
    resumed = {"segments": [segment(), segment(numerics=2)]}
    assert marks(**resumed) == ("computed by numerics 1 and 2, others by numerics 1",)
    unknown = "of unknown versions: recorded before records kept them"
    assert marks(segments=None, schema=1) == (unknown,)
    assert marks(**of(numerics=None, sources="0" * 16)) == (unknown,)


def test_the_digest_of_the_published_records_is_version_1(tmp_path):
    old = of(numerics=None, sources="b1039ac938c8dc77")
    rows = [make_row(SGD, seed, 5.0 + seed / 9, **old) for seed in (1, 2, 3)]
    rows += [make_row(KOALA, seed, 4.0 + seed / 8) for seed in (1, 2, 3)]
    table = make_table(tmp_path, rows)
    assert number(table, KOALA).best and number(table, SGD).marks == ()


def test_cells_are_compared_that_agree_with_each_other_whatever_is_installed(tmp_path):
    def best(sgd, koala):
        rows = [make_row(SGD, seed, 5.0 + seed / 9, **sgd) for seed in (1, 2, 3)]
        rows += [make_row(KOALA, seed, 4.0 + seed / 8, **koala) for seed in (1, 2, 3)]
        return number(make_table(tmp_path, rows), KOALA).best

    assert best(of(numerics=7), of(numerics=7)) and best(of(versions={"torch": "1.0"}), of(versions={"torch": "1.0"}))
    assert not best(of(numerics=7), of(numerics=8)) and not best(of(versions={"torch": "1.0"}), of())
    timm = {"config": {"optim": {"_target_": "timm.optim.Mars"}}}
    assert best(of(versions={"timm": "1.0"}), of(versions={"timm": "2.0"}) | timm)  # one of the two uses it
    assert not best(of(versions={"timm": "1.0"}) | timm, of(versions={"timm": "2.0"}) | timm)


def test_rows_of_the_newest_versions_take_the_place_of_older_ones(tmp_path):
    old = [make_row(SGD, seed, 1.0, **of(numerics=7), point={"optim.rho": 9}, val_loss=0.1)
           for seed in (1, 2, 3, 4)]  # fmt: skip
    later = {"finished": "2027-01-01T00:00:00+00:00"}
    new = [make_row(SGD, seed, 5.0, point={"optim.lr": 1}, **later) for seed in (1, 2, 3)]
    some = make_table(tmp_path, old + new, TUNED)
    assert number(some, SGD).value == 1.0  # the other rate has not been tried again
    new += [make_row(SGD, 1, 6.0, point={"optim.lr": 2}, val_loss=2.0, **later)]
    table = make_table(tmp_path, old + new, TUNED)
    assert (number(table, SGD).value, number(table, SGD).n) == (5.0, 3)
    assert [trial.point for trial in table.entry(SGD).trials] == [{"optim.lr": 1}, {"optim.lr": 2}]


def test_fewer_seeds_and_diverged_runs_are_marked(tmp_path):
    rows = [make_row(SGD, 1, 3.0), make_row(SGD, 2, 99.0, status="diverged")]
    found = number(make_table(tmp_path, rows), SGD)
    assert (found.value, found.finite, found.n) == (None, 1, 2)
    assert found.marks == ("1 of 2 runs diverged", "n = 2 (paper: 3)")


def test_profile_that_is_not_comparable_has_no_difference(tmp_path):
    found = number(make_table(tmp_path, [make_row(SGD, 1, profile="smoke", epochs=1)], profile="smoke"), SGD)
    assert found.published == 5.0 and found.difference is None
    assert found.marks == ("smoke profile, not the paper's setting",)


def test_runs_that_fall_short_of_their_own_profile_are_marked_too(tmp_path):
    text = SPEC.replace("smoke: {comparable: false, seeds: [1]", "smoke: {comparable: false, seeds: [1, 2, 3]")
    rows = [make_row(SGD, seed, profile="smoke", epochs=0.5, precision="bf16") for seed in (1, 2)]
    found = number(make_table(tmp_path, rows, text, "smoke"), SGD)
    assert found.marks[1:] == ("n = 2 (smoke: 3)", "0.5 epochs (smoke: 1)", "bf16 (smoke: fp32)")
    stopped = text.replace("[epochs=1]", "[max_steps=4]")
    found = number(make_table(tmp_path, [make_row(SGD, seed, profile="smoke", epochs=0.5) for seed in (1, 2, 3)],
                              stopped, "smoke"), SGD)  # fmt: skip
    assert len(found.marks) == 1  # steps were asked for, not epochs


def test_what_a_shorter_profile_sets_otherwise_is_marked(tmp_path):
    """It is compared with the paper, whatever else it changes."""
    when = "[{match: {optim: sgd}, overrides: [optim.lr=2]}]"
    quick = f"  quick: {{seeds: [1, 2, 3], overrides: [batch_size=8, logger=none], when: {when}}}\n"
    rows = [make_row(cell, seed, profile="quick") for cell in (SGD, KOALA) for seed in (1, 2, 3)]
    table = make_table(tmp_path, rows, SPEC + quick, "quick")
    batch, rate = "batch_size = 8 (assumed: not given)", "optim.lr = 2 (assumed: not given)"
    assert {batch, rate} <= set(number(table, SGD).marks)
    assert batch in number(table, KOALA).marks and rate not in number(table, KOALA).marks


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
    text = SPEC.replace(METRIC, f"error: {metric}") + "timed: true\n"
    table = make_table(tmp_path, [make_row(SGD, 1, 4.0)], text)
    assert number(table, SGD).value == pytest.approx(value)


def test_key_and_target_may_differ_by_the_values_of_an_axis(tmp_path):
    by_cell = """{label: E, unit: epoch, key: {data: {digits: test_loss, letters: test_top1_error}},
                  below: {data: {digits: 0.75, letters: 6.0}}}"""
    text = SPEC.replace(METRIC, f"error: {by_cell}").replace("  smoke: {", "  smoke: {metrics: {error: {below: 0.6}}, ")
    rows = [make_row({"data": data, "optim": "sgd"}, profile=profile)
            for data in ("digits", "letters") for profile in ("full", "smoke")]  # fmt: skip
    table = make_table(tmp_path, rows, text)
    assert number(table, SGD).value == 5.0  # 1 - 5 / 20
    assert number(table, {"data": "letters", "optim": "sgd"}).value == 5.0  # 4 (2 - 5 / 10)
    assert (
        number(make_table(tmp_path, rows, text, "smoke"), SGD).value == 8.0
    )  # 1 - 8 / 20: a profile's is for all cells
    with pytest.raises(ConfigError, match=r"small.yaml: metrics.error.below.data"):
        make_table(tmp_path, rows, text.replace("{digits: 0.75, letters: 6.0}", "{digits: 0.75}"))


@pytest.mark.parametrize(
    "metric, status",
    [
        ("{label: E, key: test_loss, below: 0.1, unit: seconds}", "not reached"),
        ("{label: E, key: test_loss, below: 0.1, unit: seconds, better: neither}", "not reached"),
        ("{label: E, key: test_loss, below: 0.1, unit: epoch}", "not reached"),
        ("{label: E, key: test_loss, after_seconds: 0.5}", "not measured"),
        ("{label: E, record: no.such.field}", "not measured"),
    ],
)
def test_number_that_is_not_there(tmp_path, metric, status):
    text = SPEC.replace(METRIC, f"error: {metric}") + "timed: true\n"
    table = make_table(tmp_path, [make_row(SGD, 1)], text)
    assert number(table, SGD).status == status


def test_grid_shows_the_point_with_the_best_validation_not_the_best_test(tmp_path):
    text = TUNED.replace("[1, 2]", "[1, 2, 3]")
    rows = [make_row(SGD, seed, 5.0, val_loss=0.2, point={"optim.lr": 1}) for seed in (1, 2)]
    rows += [make_row(SGD, seed, 1.0, val_loss=0.9, point={"optim.lr": 2}) for seed in (1, 2)]
    rows += [make_row(SGD, 1, 0.5, val_loss=0.1, point={"optim.lr": 3})]
    rows += [make_row(SGD, 2, 0.5, point={"optim.lr": 3}, status="diverged")]  # unstable: behind every stable point
    entry = make_table(tmp_path, rows, text).entry(SGD)
    assert entry.point == {"optim.lr": 1} and entry.numbers["error"].value == 5.0
    assert [(trial.point["optim.lr"], trial.value) for trial in entry.trials] == [(1, 0.2), (2, 0.9), (3, None)]
    more = [make_row(SGD, seed, 5.0, val_loss=9.0, point={"optim.lr": 1}) for seed in (3, 4)]  # the chosen one's others
    assert make_table(tmp_path, rows + more, text).entry(SGD).point == {"optim.lr": 1}
    selected = [row | {"config": {"select": "best-val"}, "metrics": row["metrics"] | {
        "best": {"val_loss": {"value": 0.5 / row["point"]["optim.lr"], "epoch": 1.0}}}} for row in rows]  # fmt: skip
    assert make_table(tmp_path, selected, text).entry(SGD).point == {"optim.lr": 2}  # of the model that is kept
    [single] = words.searches(make_table(tmp_path, rows[::2], text))
    assert "chosen on val_loss (one seed) among 3" in single
    [note] = words.searches(make_table(tmp_path, rows, text))
    assert "optim.lr = 1, chosen on val_loss (mean of 2 seeds) among 3" in note
    assert "3: diverged" in note and "edge of the grid" in note


@pytest.mark.parametrize(
    "config, libraries",
    [
        ({"optim": {"_target_": "koala.baselines.muon.Muon"}}, {"torch", "torchvision", "pytorch-optimizer"}),
        ({"optim": {"_target_": "pytorch_optimizer.SOAP"}}, {"torch", "torchvision", "pytorch-optimizer"}),
        ({"optim": {"_target_": "koala.MomentumKOALA"}}, {"torch", "torchvision"}),
        ({"optim": {"_target_": "timm.optim.Mars"}}, {"torch", "torchvision", "timm"}),
        ({"optim": {"_target_": "torch.optim.SGD"}, "model": {"family": "vit"}}, {"torch", "torchvision", "timm"}),
    ],
)
def test_libraries_count_that_a_row_computes_with(config, libraries):
    assert versions([make_row({}, config=config)]).keys() == libraries | {"numerics"}


def test_rows_of_other_data_are_not_pooled_in_silence_nor_compared(tmp_path):
    def rows(cell, errors, contents):
        return [make_row(cell, seed, error, data={"name": "digits", "fingerprint": content, "revision": None})
                for seed, (error, content) in enumerate(zip(errors, contents, strict=True), 1)]  # fmt: skip

    sgd, better = [5.0, 7.0, 9.0], [4.0, 6.01, 7.99]
    assert number(make_table(tmp_path, rows(SGD, sgd, "aaa") + rows(KOALA, better, "aaa")), KOALA).best
    mixed = make_table(tmp_path, rows(SGD, sgd, "aaa") + rows(KOALA, better, "aba"))
    assert not number(mixed, KOALA).best and "data of 2 contents behind one cell" in number(mixed, KOALA).marks
    assert not number(make_table(tmp_path, rows(SGD, sgd, "aaa") + rows(KOALA, better, "bbb")), KOALA).best


def test_a_rate_that_other_versions_chose_is_not_compared(tmp_path):
    def rows(**second):
        return [make_row(cell, seed, error, point={"optim.lr": rate}, val_loss=float(rate),
                         segments=[segment(**(second if rate == 2 else {}))])
                for cell, errors in ((SGD, [5.0, 7.0, 9.0]), (KOALA, [4.0, 6.01, 7.99]))
                for rate in (1, 2) for seed, error in enumerate(errors, 1)]  # fmt: skip

    assert number(make_table(tmp_path, rows(), TUNED), KOALA).best
    older = make_table(tmp_path, rows(numerics=7), TUNED)
    assert not number(older, KOALA).best
    assert "runs of other versions or of uncommitted code chose its rate" in number(older, SGD).marks


def test_times_of_two_commands_are_not_compared(tmp_path):
    text = SPEC.replace(METRIC, "error: {label: Seconds, record: seconds.train}") + "timed: true\n"

    def rows(cell, command, slower):
        return [make_row(cell, seed, seconds={"train": 10.0 + slower + seed * slower, "eval": 0.0},
                         timing={"command": command, "jobs": 1}) for seed in (1, 2, 3)]  # fmt: skip

    together = make_table(tmp_path, rows(SGD, "c", 0.1) + rows(KOALA, "c", 0.2), text)
    assert number(together, SGD).tied or number(together, SGD).best
    apart = make_table(tmp_path, rows(SGD, "c", 0.1) + rows(KOALA, "d", 0.2), text)
    assert not any((number(apart, cell).tied or number(apart, cell).best) for cell in (SGD, KOALA))
    mixed = make_table(tmp_path, rows(SGD, "c", 0.1)[:1] + rows(SGD, "d", 0.1)[1:], text)
    assert APART in number(mixed, SGD).marks


def test_a_record_that_contradicts_its_cell_is_marked_and_not_compared(tmp_path):
    text = SPEC.replace("{label: SGD}", "{label: SGD, overrides: [optim=sgd, optim.lr=1e-1]}")
    rows = [make_row(KOALA, seed, 4.0 + seed / 8) for seed in (1, 2, 3)]

    def best_and_marks(rate, **more):
        config = {"select": "last", "optim": {"name": "sgd", "lr": rate}} | more
        sgd = [make_row(SGD, seed, 5.0 + seed / 9, config=config) for seed in (1, 2, 3)]
        table = make_table(tmp_path, rows + sgd, text)
        return number(table, KOALA).best, [mark for mark in number(table, SGD).marks if "recorded with" in mark]

    assert best_and_marks(0.1) == best_and_marks(0.1, num_gpus=2) == (True, [])
    assert best_and_marks(0.2) == (False, ["recorded with optim.lr=0.2, where this cell has 1e-1"])


def test_more_trials_than_the_others_had_are_no_fair_comparison(tmp_path):
    def trials(cell, errors, rates):
        return [make_row(cell, seed, error, point={"optim.lr": rate}, val_loss=float(rate))
                for rate in rates for seed, error in enumerate(errors, 1)]  # fmt: skip

    sgd, better = [5.0, 7.0, 9.0], [4.0, 6.01, 7.99]
    equal = make_table(tmp_path, trials(SGD, sgd, (1, 2)) + trials(KOALA, better, (1, 2)), TUNED)
    assert number(equal, KOALA).best
    more = make_table(tmp_path, trials(SGD, sgd, (1, 2)) + trials(KOALA, better, (1, 2, 3)), TUNED)
    assert not number(more, KOALA).best
    apart = trials(KOALA, better, (1,)) + [make_row(KOALA, 9, 1.0, point={"optim.lr": 2}, val_loss=0.1)]
    table = make_table(tmp_path, apart, TUNED)
    assert table.entry(KOALA).trials[1].value is None  # tried on another seed
    assert any("2: not on the others' seeds" in note for note in words.searches(table))


def test_one_rate_where_the_full_profile_has_several_says_so(tmp_path):
    table = make_table(tmp_path, [make_row(SGD, 1, 5.0)], TUNED)
    assert "one rate (the best of 2 or more in the full profile)" in number(table, SGD).marks
    begun = make_table(tmp_path, [make_row(SGD, 1, 5.0), make_row(SGD, 1, 4.0, point={"optim.lr": 1})], TUNED)
    assert number(begun, SGD).value == 4.0 and begun.entry(SGD).trials == []  # the run without a point is no trial
