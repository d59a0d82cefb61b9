"""Experiment files: what is refused, and that the real ones answer to every published cell."""

import pytest
import yaml

from koala.errors import ConfigError
from koala.tables.cli import EXPERIMENTS
from koala.tables.experiment import find_experiments, load_experiment, merge_overrides
from tests.tables.synthetic import SPEC

TABLES = find_experiments(EXPERIMENTS)
TUNED = SPEC.replace("{label: SGD}", "{label: SGD, grid: {optim.lr: [1, 2]}}").replace(
    "{label: KOALA-M}", "{label: KOALA-M, grid: {optim.lr: [3, 4]}}") + "\nchoose: val_loss\n"  # fmt: skip


def experiment(folder, text=SPEC):
    (folder / "small.yaml").write_text(text)
    return load_experiment(folder, "small")


def faulty_key(folder, text) -> str:
    """The key that the error for this file names."""
    with pytest.raises(ConfigError) as caught:
        experiment(folder, text)
    file, key = caught.value.key.split(": ", 1)
    assert file == str(folder / "small.yaml")
    return key


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("title: A small table\n", "", "title"),
        ("title: A small table", "titel: A small table", "titel"),
        ("rows: [optim]", "rows: [optim]\nrow: [optim]", "row"),
        ("rows: [optim]\ncolumns: [data]", "rows: []\ncolumns: [data, optim]", "rows"),
        ("rows: [optim]", "rows: [data]", "rows"),
        ("rows: [optim]", "rows: [optim]\ncompare: colour", "compare"),
        ("caption: Made for a test.", "caption: [1, 2]", "caption"),
        ("seeds: [1, 2, 3]", "seeds: 3", "profiles.full.seeds"),
        ("seeds: [1, 2, 3]", "seeds: [1.5]", "profiles.full.seeds.0"),
        ("seeds: [1, 2, 3]", "seeds: ['1']", "profiles.full.seeds.0"),
        ("seeds: [1, 2, 3]", "seeds: [1, -2]", "profiles.full.seeds.1"),
        ("seeds: [1, 2, 3]", "seeds: [1, 1]", "profiles.full.seeds"),
        ("seeds: [1, 2, 3]", "seeds: []", "profiles.full.seeds"),
        ("seeds: [1, 2, 3]", "seeds: [1], trial_seeds: 1.5", "profiles.full.trial_seeds"),
        ("seeds: [1, 2, 3]", "seeds: [1], trial_seeds: 0", "profiles.full.trial_seeds"),
        ("seeds: [1, 2, 3]", "seeds: [1, 2], trial_seeds: 3", "profiles.full.trial_seeds"),
        ("seeds: [1, 2, 3]", "seeds: [1], trial_seeds: {data: {digits: 1}}", "profiles.full.trial_seeds.data"),
        ("seeds: [1, 2, 3]", "seeds: [1], metrics: {eror: {below: 1}}", "profiles.full.metrics"),
        ("seeds: [1, 2, 3]", "seeds: [1], metrics: {error: {profile: none}}", "profiles.full.metrics.error.profile"),
        ("key: test_top1_error,", "key: a, digits: 1.5,", "metrics.error.digits"),
        ("key: test_top1_error,", "key: a, digits: -1,", "metrics.error.digits"),
        ("key: test_top1_error,", "", "metrics.error.key"),
        ("key: test_top1_error,", "key: a, record: epochs,", "metrics.error.key"),
        ("key: test_top1_error,", "key: a, better: larger,", "metrics.error.better"),
        ("key: test_top1_error,", "key: a, relative: adam,", "metrics.error.relative"),
        ("key: test_top1_error,", "key: {colour: {red: a}},", "metrics.error.key"),
        ("key: test_top1_error,", "key: {data: {digits: a}},", "metrics.error.key.data"),
        ("key: test_top1_error,", "record: seconds.train,", "timed"),
        ("  full:", "  whole:", "profiles"),
        ("{match: {optim: magic}", "{match: {optim: magick}", "needs.0.match.optim"),
        ("{match: {optim: magic}", "{match: {colour: red}", "needs.0.match"),
        (", reason: nobody wrote it", "", "needs.0.reason"),
        ("reason: nobody wrote it", 'reason: ""', "needs.0.reason"),
        ("reason: nobody wrote it", "reason: a, overrides: [epochs=1]", "needs.0.overrides"),
        ("base: [data=digits, epochs=10]", "base: [data=digits, epochs]", "base.1"),
        ("published: [paper, table1]", "published: [paper]", "published.1"),
        ("sgd: {label: SGD}", "sgd: {label: SGD, grid: {optim.lr: [1, 2]}}", "choose"),
        ("sgd: {label: SGD}", "sgd: {label: SGD, grid: {optim.lr: 1}}", "axes.optim.values.sgd.grid.optim.lr"),
        ("axes:", "axes: 3\nother:", "other"),
        ("koala-m: {label: KOALA-M}", "koala-m: {label: SGD}", "axes.optim.values"),
        ("metrics:", "metrics:\n  other: {label: Error (%), record: epochs}", "metrics"),
        ("comparable: false", "comparable: maybe", "profiles.smoke.comparable"),
    ],
)
def test_fault_in_a_file_names_file_and_key(tmp_path, old, new, key):
    assert old in SPEC
    assert faulty_key(tmp_path, SPEC.replace(old, new, 1)) == key


@pytest.mark.parametrize(
    "figure, key",
    [
        ("kind: curve, y: tets_loss", "y"),
        ("kind: curve, y: test_loss, x: epochs", "x"),
        ("kind: sensitivity, x: sigma, y: eror", "y"),
        ("kind: sensitivity, x: optim, y: error", "x"),
        ("kind: sensitivity, y: error", "x"),
    ],
)
def test_figure_of_what_is_not_there_is_refused(tmp_path, figure, key):
    text = SPEC.replace("axes:", "axes:\n  sigma: {values: {0.1: {}, 1: {}}}").replace("rows: [", "rows: [sigma, ")
    for good in ("kind: sensitivity, x: sigma, y: error", "y: filter_R", "y: test_loss, x: seconds"):
        experiment(tmp_path, f"{text}timed: true\nfigures: {{own: {{title: Own, {good}}}}}\n")
    assert faulty_key(tmp_path, f"{text}figures: {{own: {{title: Own, {figure}}}}}\n") == f"figures.own.{key}"


@pytest.mark.parametrize("text", ["axes: [unclosed", "!!python/object/apply:os.system ['true']", "just words"])
def test_file_that_is_no_plain_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="small.yaml"):
        experiment(tmp_path, text)


def test_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "small.yaml").write_bytes(b"title: Caf\xe9")
    with pytest.raises(ConfigError, match="small.yaml"):
        load_experiment(tmp_path, "small")


def test_unknown_table_and_profile_list_what_there_is(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_experiment(EXPERIMENTS, "koala/table99")
    assert caught.value.key.endswith("koala/table99.yaml") and {"quickstart", "koala/table2"} <= set(caught.value.valid)
    with pytest.raises(ConfigError) as caught:
        experiment(tmp_path).profile("middle")
    assert (caught.value.value, caught.value.valid) == ("middle", ("full", "smoke"))


def test_later_override_wins_once():
    assert merge_overrides(["a=1", "b=2", "a=3", "+c=4"]) == ("b=2", "a=3", "+c=4")


def test_cells_are_the_product_with_each_values_overrides(tmp_path):
    small = experiment(tmp_path)
    cells = {tuple(cell.key.values()): cell for cell in small.cells(small.profile("smoke"))}
    assert len(cells) == 6
    assert cells["letters", "sgd"].settings == (({}, ("data=letters", "optim=sgd", "epochs=1")),)
    assert cells["digits", "magic"].blocked == "nobody wrote it" and cells["digits", "sgd"].runs


def test_grid_makes_one_setting_a_point_and_keeps_whole_numbers_whole(tmp_path):
    small = experiment(tmp_path, TUNED)
    settings = small.cells(small.profile("full"))[0].settings
    assert [point for point, _ in settings] == [{"optim.lr": 1}, {"optim.lr": 2}]
    assert "optim.lr=2" in settings[-1][1]


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("choose: val_loss", "choose: test_loss", "choose"),
        ("[3, 4]", "[3, 4, 5]", "axes"),
        ("[3, 4]", "[3]", "axes.optim.values.koala-m.grid.optim.lr"),
        ("[3, 4]", "[3, 3]", "axes.optim.values.koala-m.grid.optim.lr"),
        ("[3, 4]", "[1e-3, 1e-2]", "axes.optim.values.koala-m.grid.optim.lr"),
        ("[3, 4]", "[true, false]", "axes.optim.values.koala-m.grid.optim.lr"),
        (", grid: {optim.lr: [3, 4]}", "", "axes"),
        ("{optim.lr: [3, 4]}", "{optim.lr: [3, 4], optim.q: [1, 2]}", "axes.optim.values.koala-m.grid"),
        ("{label: Digits,", "{label: Digits, grid: {batch_size: [1, 2]},", "compare"),
        ("choose: val_loss", "choose: val_loss\ncompare: data", "compare"),
    ],
)
def test_unfair_tuning_is_refused(tmp_path, old, new, key):
    assert faulty_key(tmp_path, TUNED.replace(old, new)) == key


SOURCES = """
sources:
  - {source: paper, keys: [epochs, seeds], note: Section 4}
  - {source: released, match: {optim: koala-m}, keys: [epochs, optim.sigma]}
"""


def test_settings_are_assumed_unless_a_source_names_them(tmp_path):
    small = experiment(tmp_path, TUNED + SOURCES)
    settings = small.settings({"data": "digits", "optim": "sgd"})
    assert {(setting.key, setting.value, setting.rule.source) for setting in settings} == {
        ("seeds", "1, 2, 3", "paper"), ("epochs", "10", "paper"), ("optim.lr", "one of 1, 2", "assumed")
    }  # fmt: skip
    koala = {setting.key: setting.rule.source for setting in small.settings({"data": "digits", "optim": "koala-m"})}
    assert koala == {"seeds": "paper", "epochs": "released", "optim.sigma": "released", "optim.lr": "assumed"}


def test_cells_that_a_profile_leaves_out_are_not_blocked(tmp_path):
    rule = "  smoke: {leaves_out: [{match: {optim: sgd}, reason: too long}], "
    small = experiment(tmp_path, SPEC.replace("  smoke: {", rule))
    for profile, left_out in (("smoke", "too long"), ("full", "")):
        cell = small.cells(small.profile(profile))[0]
        assert (cell.blocked, cell.left_out, cell.runs) == ("", left_out, not left_out)


def test_all_tables_of_the_papers_are_there():
    koala = [f"koala/table{n}" for n in range(2, 9)] + [f"koala/supplement_table{n}" for n in (1, 2, 3)]
    assert {*koala, "koala++/table1", "koala++/table2", "sofim/time-to-target", "quickstart"} <= set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_every_file_keeps_the_rules_and_names_itself(name):
    found = load_experiment(EXPERIMENTS, name)
    assert found.name == name and {"full", "smoke"} <= set(found.profiles)
    assert yaml.safe_load(found.path.read_text())["title"] == found.title
