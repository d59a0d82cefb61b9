"""Experiment files: what is refused, and that the real ones answer to every published cell."""

import pytest
import yaml

from koala.errors import ConfigError
from koala.runs import compose
from koala.runs.metrics import metric_keys
from koala.tables.load import HISTORY, find_specs, load_spec
from koala.tables.publish import EXPERIMENTS, PUBLISHED
from koala.tables.published import duration, load_published
from koala.tables.spec import merge_overrides
from tests.tables.synthetic import SPEC, make_spec

TABLES = find_specs(EXPERIMENTS)
TUNED = SPEC.replace("{label: SGD}", "{label: SGD, grid: {optim.lr: [1, 2]}}").replace(
    "{label: KOALA-M}", "{label: KOALA-M, grid: {optim.lr: [3, 4]}}") + "\nchoose: val_loss\n"  # fmt: skip


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("title: A small table", "titel: A small table", ["title", "missing"]),
        ("rows: [optim]", "rows: [optim]\nrow: [optim]", ["row ", "not a key", "rows"]),
        ("rows: [optim]\ncolumns: [data]", "rows: []\ncolumns: [data, optim]", ["rows", "at least one axis", "optim"]),
        ("rows: [optim]", "rows: [data]", ["rows", "every axis once", "optim"]),
        ("caption: Made for a test.", "caption: [1, 2]", ["caption", "must be text", "[1, 2]"]),
        ("seeds: [1, 2, 3]", "seeds: 3", ["profiles.full.seeds", "list of whole numbers", "3"]),
        ("seeds: [1, 2, 3]", "seeds: [1.5]", ["profiles.full.seeds", "list of whole numbers", "1.5"]),
        ("seeds: [1, 2, 3]", "seeds: [1, -2]", ["profiles.full.seeds", "none below 0", "-2"]),
        ("seeds: [1, 2, 3]", "seeds: [1, 1]", ["profiles.full.seeds", "different", "[1, 1]"]),
        ("seeds: [1, 2, 3]", "seeds: [1], trial_seeds: 1.5", ["profiles.full.trial_seeds", "whole number", "1.5"]),
        ("seeds: [1, 2, 3]", "seeds: [1], trial_seeds: 0", ["profiles.full.trial_seeds", "is 0", "1 ... 1"]),
        ("seeds: [1, 2, 3]", "seeds: [1, 2], trial_seeds: 3", ["profiles.full.trial_seeds", "is 3", "1 ... 2"]),
        ("key: test_top1_error,", "key: a, digits: 1.5,", ["metrics.error.digits", "whole number", "1.5"]),
        ("key: test_top1_error,", "key: a, digits: -1,", ["metrics.error.digits", "is -1", "0 ..."]),
        ("seeds: [1, 2, 3]", "seeds: []", ["profiles.full.seeds", "at least one"]),
        ("  full:", "  whole:", ["profiles", "'full'", "whole"]),
        ("{match: {optim: magic}", "{match: {optim: magick}", ["needs.0.match.optim", "magick", "sgd, koala-m, magic"]),
        ("{match: {optim: magic}", "{match: {colour: red}", ["needs.0.match", "colour", "data, optim"]),
        (", reason: nobody wrote it", "", ["needs.0.reason", "is missing", "text"]),
        ("reason: nobody wrote it", 'reason: ""', ["needs.0.reason", "is empty"]),
        ("reason: nobody wrote it", "reason: a, overrides: [epochs=1]", ["needs.0.overrides", "reason"]),
        ("base: [data=digits, epochs=10]", "base: [data=digits, epochs]", ["base", "'epochs'", "key=value"]),
        ("key: test_top1_error,", "", ["metrics.error.key", "exactly one"]),
        ("key: test_top1_error,", "key: a, better: larger,", ["metrics.error.better", "larger", "lower, higher"]),
        ("published: [paper, table1]", "published: [paper]", ["published", "[paper, table]"]),
        ("sgd: {label: SGD}", "sgd: {label: SGD, grid: {optim.lr: [1, 2]}}", ["choose", "missing"]),
        (
            "sgd: {label: SGD}",
            "sgd: {label: SGD, grid: {optim.lr: 1}}",
            ["axes.optim.values.sgd.grid.optim.lr", "list"],
        ),
        ("axes:", "axes: 3\nother:", ["axes", "mapping", "3"]),
        ("key: test_top1_error,", "record: seconds.train,", ["timed", "must be true", "metrics.error"]),
        ("comparable: false", "comparable: maybe", ["profiles.smoke.comparable", "true or false", "maybe"]),
    ],
)
def test_fault_in_a_file_names_file_and_key(tmp_path, old, new, said):
    assert old in SPEC
    with pytest.raises(ConfigError) as caught:
        make_spec(tmp_path, SPEC.replace(old, new, 1))
    message = str(caught.value)
    assert "small.yaml" in message
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    "figure, said",
    [
        ("kind: curve, y: tets_loss", ["y is 'tets_loss'", "test_loss", "filter_R", "gain"]),
        ("kind: curve, y: test_loss, x: epochs", ["x is 'epochs'", "epoch, step, seconds"]),
        ("kind: sensitivity, x: sigma, y: eror", ["y is 'eror'", "valid: error"]),
        ("kind: sensitivity, x: optim, y: error", ["x is 'optim'", "valid: sigma"]),
        ("kind: sensitivity, y: error", ["x is 'epoch'", "valid: sigma"]),
    ],
)
def test_figure_of_what_is_not_there_is_refused(tmp_path, figure, said):
    text = SPEC.replace("axes:", "axes:\n  sigma: {values: {0.1: {}, 1: {}}}").replace("rows: [", "rows: [sigma, ")
    for good in ("kind: sensitivity, x: sigma, y: error", "y: filter_R", "y: gain", "y: test_loss, x: seconds"):
        make_spec(tmp_path, f"{text}timed: true\nfigures: {{own: {{title: Own, {good}}}}}\n")
    with pytest.raises(ConfigError) as caught:
        make_spec(tmp_path, f"{text}figures: {{own: {{title: Own, {figure}}}}}\n")
    assert all(part in str(caught.value) for part in ["small.yaml: figures.own.", *said]), caught.value


@pytest.mark.parametrize("given", ["data=digits", "data=pydocs", "data=wikitext2-gpt1", "data=cifar10 model=dcgan"])
def test_every_metric_of_a_run_can_be_a_figures(given):
    assert set(metric_keys(compose(given.split()))) <= set(HISTORY)


@pytest.mark.parametrize("text", ["axes: [unclosed", "!!python/object/apply:os.system ['true']", "just words"])
def test_file_that_is_no_plain_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="small.yaml"):
        make_spec(tmp_path, text)


def test_file_that_is_not_utf8_is_refused(tmp_path):
    make_spec(tmp_path)
    (tmp_path / "experiments" / "small.yaml").write_bytes(b"title: Caf\xe9")
    with pytest.raises(ConfigError, match="small.yaml is not YAML"):
        load_spec(tmp_path / "experiments", "small")


def test_unknown_table_lists_the_known_ones():
    with pytest.raises(ConfigError, match="koala/table99.*quickstart.*koala/table2"):
        load_spec(EXPERIMENTS, "koala/table99")


def test_unknown_profile_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="small.yaml.*'middle'.*full, smoke"):
        make_spec(tmp_path).profile("middle")


def test_later_override_wins_once():
    assert merge_overrides(["a=1", "b=2", "a=3", "+c=4"]) == ("b=2", "a=3", "+c=4")


def test_cells_are_the_product_with_each_values_overrides(tmp_path):
    spec = make_spec(tmp_path)
    cells = {tuple(cell.key.values()): cell for cell in spec.cells(spec.profile("smoke"))}
    assert len(cells) == 6
    assert cells["letters", "sgd"].settings == (({}, ("data=letters", "optim=sgd", "epochs=1")),)
    assert cells["digits", "magic"].blocked == "nobody wrote it" and cells["digits", "sgd"].blocked is None


def test_grid_makes_one_setting_a_point(tmp_path):
    spec = make_spec(tmp_path, TUNED)
    points = [point for point, _ in spec.cells(spec.profile("full"))[0].settings]
    assert points == [{"optim.lr": 1}, {"optim.lr": 2}]
    assert "optim.lr=2" in spec.cells(spec.profile("full"))[0].settings[-1][1]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("choose: val_loss", "choose: test_loss", ["choose", "'test_loss'", "only validation", "val_loss"]),
        ("[3, 4]", "[3, 4, 5]", ["axes", "unequal", "'sgd': 2", "'koala-m': 3"]),
        ("[3, 4]", "[3]", ["koala-m.grid.optim.lr", "at least two different numbers", "[3]"]),
        ("[3, 4]", "[3, 3]", ["koala-m.grid.optim.lr", "different", "[3, 3]"]),
        ("[3, 4]", "[1e-3, 1e-2]", ["koala-m.grid.optim.lr", "['1e-3', '1e-2']", "1.0e-3"]),
        ("[3, 4]", "[true, false]", ["koala-m.grid.optim.lr", "[True, False]"]),
        (", grid: {optim.lr: [3, 4]}", "", ["axes", "unequal"]),
        ("{optim.lr: [3, 4]}", "{optim.lr: [3, 4], optim.q: [1]}", ["koala-m.grid", "one key"]),
    ],
)
def test_unfair_tuning_is_refused(tmp_path, old, new, said):
    with pytest.raises(ConfigError) as caught:
        make_spec(tmp_path, TUNED.replace(old, new))
    assert all(part in str(caught.value) for part in ["small.yaml", *said]), caught.value


SOURCES = """
sources:
  - {source: paper, keys: [epochs, seeds], note: Section 4}
  - {source: released, match: {optim: koala-m}, keys: [epochs, optim.sigma]}
"""


def test_settings_are_assumed_unless_somebody_said_them(tmp_path):
    spec = make_spec(tmp_path, TUNED + SOURCES)
    sgd = {
        (setting.key, setting.value, setting.source) for setting in spec.settings({"data": "digits", "optim": "sgd"})
    }
    assert sgd == {("seeds", "1, 2, 3", "paper"), ("epochs", "10", "paper"), ("optim.lr", "one of 1, 2", "assumed")}
    koala = {setting.key: setting.source for setting in spec.settings({"data": "digits", "optim": "koala-m"})}
    assert koala == {"seeds": "paper", "epochs": "released", "optim.sigma": "released", "optim.lr": "assumed"}


def test_cells_that_a_profile_leaves_out_are_not_blocked(tmp_path):
    rule = "  smoke: {leaves_out: [{match: {optim: sgd}, reason: too long}], "
    spec = make_spec(tmp_path, SPEC.replace("  smoke: {", rule))
    for profile, left_out in (("smoke", "too long"), ("full", None)):
        cell = spec.cells(spec.profile(profile))[0]
        assert (cell.blocked, cell.left_out, cell.runs) == (None, left_out, left_out is None)


@pytest.mark.parametrize("name", TABLES)
def test_every_published_cell_has_one_cell_of_ours_and_its_number_a_metric(name):
    spec = load_spec(EXPERIMENTS, name)
    assert {"full", "smoke"} <= set(spec.profiles)
    published = load_published(PUBLISHED, spec)
    if published is None:
        return
    ours = [spec.published_key(key) for key in spec.keys()]
    shown = {field for metric in spec.metrics for field in (metric.published, metric.published_std) if field}
    for names, numbers in published.cells:
        matches = [key for key in ours if all(key.get(axis) == value for axis, value in names.items())]
        assert len(matches) == 1, names
        assert set(numbers) <= shown, numbers
    assert len(ours) == len(published.cells)


def test_all_tables_of_the_papers_are_there():
    koala = [f"koala/table{n}" for n in range(2, 9)] + [f"koala/supplement_table{n}" for n in (1, 2, 3)]
    assert {*koala, "koala++/table1", "koala++/table2", "sofim/time-to-target", "quickstart"} <= set(TABLES)


@pytest.mark.parametrize("name", ["koala.yaml", "koala_plus_plus.yaml"])
def test_published_numbers_are_the_papers(shared, name):
    ours = yaml.safe_load((PUBLISHED / name).read_text())
    printed = yaml.safe_load((shared / "papers" / "published" / name).read_text())
    # ours has more: points read off a poster, under names of their own
    read_off = {name for name in ours["tables"] if name.startswith("figure")} - set(printed["tables"])
    ours["tables"] = {name: table for name, table in ours["tables"].items() if name not in read_off}
    ours.pop("figures", None)
    assert ours == printed


def test_published_durations():
    assert duration("3h40m") == 13_200 and duration("45s") == 45
    with pytest.raises(ValueError, match="soon"):
        duration("soon")
