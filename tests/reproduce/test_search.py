"""The search of rates and the order of timed runs, on records written by hand: nothing is trained."""

from pathlib import Path

import pytest

from koala import fingerprint, records
from koala.errors import ConfigError
from koala.reproduce.plan import Plan
from koala.reproduce.search import ROUNDS, grow
from koala.tables.experiment import Experiment, load_experiment
from koala.tables.table import APART, BUSY, build
from tests.refused import assert_names
from tests.tables.synthetic import make_experiment, make_row

pytestmark = pytest.mark.extended

SPEC = """
title: Tuned
base: [data=digits, model=mlp, epochs=1, num_gpus=0, logger=none]
axes:
  optim:
    values: {sgd: {grid: {optim.lr: [0.1, 0.2, 0.4]}}, adam: {grid: {optim.lr: [0.001, 0.002, 0.004]}}}
choose: val_loss
rows: [optim]
metrics:
  error: {label: Error, key: test_top1_error}
  step: {label: Step, record: step_ms, relative: sgd}
timed: true
profiles:
  full: {seeds: [1, 2, 3, 4], trial_seeds: 2}
"""
PLACE = ("table", "profile", "cell", "point", "history")  # what a row has beside its record
BEST = {"sgd": 1.6, "adam": 0.002}  # the rates that are best, beyond SGD's grid and within Adam's


def finish(plan: Plan, loss) -> int:
    """Writes the missing records: validation loss as `loss(optimizer, rate)`; returns how many."""
    missing = [run for run in plan.runs if run.record() is None]
    for run in missing:
        row = make_row({}, run.cfg.seed, val_loss=loss(run.cfg.optim.name, run.cfg.optim.lr))
        records.write_json(run.path / records.RECORD, {key: row[key] for key in row if key not in PLACE})
        records.write_rows(run.path / records.METRICS, row["history"])
    return len(missing)


def experiment(folder: Path, text: str = SPEC) -> Experiment:
    return load_experiment(make_experiment(folder, text).path.parent, "small")


def plan_in(folder: Path, text: str = SPEC, **options) -> Plan:
    return Plan([experiment(folder, text)], "full", extra=[f"output_root={folder}"], **options)


def rates(plan: Plan, optim: str, seed: int = 1) -> list[float]:
    return sorted(sample.run.cfg.optim.lr for sample in plan.samples
                  if sample.key["optim"] == optim and sample.run.cfg.seed == seed)  # fmt: skip


def test_grid_is_widened_until_the_best_is_inside_with_equal_trials_for_all(tmp_path):
    plan = plan_in(tmp_path)
    assert finish(plan, distance) == 2 * 3 * 2  # optimizers, points, trial seeds
    added = []
    while grow(plan):
        added.append(finish(plan, distance))
    assert added == [4, 4, 4, 4]  # 0.8, 1.6, 3.2 for SGD; then, at the chosen points, the two seeds that are left
    assert rates(plan, "sgd") == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    assert rates(plan, "adam") == [0.001, 0.00141, 0.00168, 0.00183, 0.002, 0.004]  # geometric middles, ever nearer
    assert rates(plan, "sgd", seed=4) == [1.6] and rates(plan, "adam", seed=4) == [0.002]
    spec = make_experiment(tmp_path, SPEC)
    table = build(spec, spec.profile("full"), plan.rows())
    assert [(entry.point["optim.lr"], len(entry.rows), len(entry.trials)) for entry in table.entries] == [
        (1.6, 4, 6), (0.002, 4, 6)]  # fmt: skip


def distance(optim: str, rate: float) -> float:
    """Ratio to the best rate, whichever way."""
    return max(rate / BEST[optim], BEST[optim] / rate)


@pytest.mark.parametrize("slope, trials", [(0.1, 3), (10.0, 4)])
def test_a_rate_at_the_edge_that_is_as_good_as_the_next_one_widens_nothing(tmp_path, slope, trials):
    plan = plan_in(tmp_path)
    loss = lambda optim, rate: max(rate / 0.2, 0.2 / rate) if optim == "sgd" else 2.0 + slope * rate  # noqa: E731
    finish(plan, loss)
    assert grow(plan)
    assert len(rates(plan, "adam")) == trials


def test_smaller_rates_are_tried_where_every_one_diverges(tmp_path):
    plan = plan_in(tmp_path)
    finish(plan, lambda optim, rate: None if optim == "sgd" else distance(optim, rate))
    assert grow(plan) and rates(plan, "sgd") == [0.05, 0.1, 0.2, 0.4]


def test_search_goes_on_where_it_stopped(tmp_path):
    plan = plan_in(tmp_path)
    while finish(plan, distance):
        grow(plan)
    again = plan_in(tmp_path)
    while grow(again):
        assert finish(again, distance) == 0
    assert {run.path for run in again.runs} == {run.path for run in plan.runs}


def test_rows_of_another_machine_stand_for_records(tmp_path):
    """All that a search has measured is found in its rows, and stays as it was; what is older is run again."""
    there = plan_in(tmp_path / "there")
    while finish(there, distance):
        grow(there)
    paths = {
        str(sample.key) + str(sample.point) + str(sample.run.cfg.seed): sample.run.path for sample in there.samples
    }
    rows = []
    for row in there.rows():
        path = paths[str(row["cell"]) + str(row["point"]) + str(row["seed"])]
        rows.append(row | {"name": "/".join(path.parts[-5:-2]), "config_hash": path.parts[-2]})
    here = plan_in(tmp_path / "here", measured=rows)
    while grow(here):
        pass
    assert sorted(map(str, here.rows())) == sorted(map(str, rows))
    assert not (tmp_path / "here" / "digits").exists()
    rows[0]["segments"][0]["numerics"] = 99
    missing = [run for run in plan_in(tmp_path / "here", measured=rows, again=True).runs if run.record() is None]
    assert len(missing) == 1 and missing[0].path.parts[-2] == rows[0]["config_hash"]
    rows[1]["config_hash"] = "of other data"
    assert len([run for run in plan_in(tmp_path / "here", measured=rows).runs if run.record() is None]) == 1


def test_search_waits_for_all_trials_and_ends_where_more_is_always_better(tmp_path):
    plan = plan_in(tmp_path)
    assert not grow(plan)  # nothing has been run
    while finish(plan, lambda optim, rate: 1 / rate):
        grow(plan)
    assert len(rates(plan, "sgd")) == 3 + ROUNDS and len(rates(plan, "sgd", seed=4)) == 1


def test_timed_runs_alternate_over_the_optimizers(tmp_path):
    plan = plan_in(tmp_path)
    seeds = [run.cfg.seed for run in plan.runs]
    assert seeds == sorted(seeds) and {run.cfg.optim.name for run in plan.runs[:6]} == {"sgd", "adam"}


def test_times_are_compared_only_within_one_command(tmp_path):
    spec = make_experiment(tmp_path, SPEC)
    alone, beside = {"command": "c1", "jobs": 1}, {"command": "c1", "jobs": 2}

    def rows(optim, step_ms, timings, load=0.9):
        part = make_row({})["segments"][0] | {"step_ms": step_ms, "load": [load, load]}
        return [make_row({"optim": optim}, seed, segments=[part], **({"timing": timing} if timing else {}))
                for seed, timing in enumerate(timings, 1)]  # fmt: skip

    def step(timings, **options):
        measured = [*rows("sgd", 2.0, [alone] * 3), *rows("adam", 3.0, timings, **options)]
        return build(spec, spec.profile("full"), measured).entry({"optim": "adam"}).numbers["step"]

    assert step([alone] * 3).value == 1.5
    assert step([alone, alone, {"command": "c2", "jobs": 1}]).n == 2
    assert APART not in step([alone] * 3).marks
    for timing in (beside, None, {"command": "c2", "jobs": 1}):
        assert step([timing] * 3).status == "not measured together"
    beside_load = [*rows("sgd", 2.0, [alone] * 3, 3.0), *rows("adam", 3.0, [alone] * 3)]  # the ratio's denominator
    found = build(spec, spec.profile("full"), beside_load).entry({"optim": "adam"}).numbers["step"]
    assert found.value == 1.5 and BUSY in found.marks
    assert BUSY not in step([alone] * 3).marks and BUSY in step([alone] * 3, load=3.0).marks
    one = [*rows("sgd", 2.0, [alone] * 3), *rows("adam", 3.0, [alone] * 2), rows("adam", 3.0, [alone] * 3, 3.0)[2]]
    table = build(spec, spec.profile("full"), one)
    assert BUSY in table.entry({"optim": "adam"}).numbers["step"].marks  # of three runs, one beside other work


@pytest.mark.parametrize(
    "old, new, key, value, valid",
    [
        ("test_top1_error", "test_top1", "metrics.error.key", "test_top1", "test_top1_error"),
        ("val_loss", "val_los", "choose", "val_los", "val_loss"),
        ("record: step_ms, relative: sgd", "record: second.train", "metrics.step.record", "second.train", "seconds"),
    ],
)  # fmt: skip
def test_metric_that_no_run_has_is_refused_before_anything_runs(tmp_path, old, new, key, value, valid):
    with pytest.raises(ConfigError) as caught:
        plan_in(tmp_path, SPEC.replace(old, new))
    error = caught.value
    assert "small.yaml" in error.key and error.key.endswith(f": {key}")
    assert error.value == value and valid in error.valid
    assert not (tmp_path / "digits").exists()


def test_records_of_another_numerics_version_are_run_again_when_asked(tmp_path):
    plan = plan_in(tmp_path)
    finish(plan, distance)
    [first, *_] = plan.runs
    record = records.read_record(first.path)
    record["segments"][0]["numerics"] = 99
    records.write_json(first.path / records.RECORD, record)
    assert all(run.record() for run in plan.runs) and "rerun=true" not in first.launched
    missing = [run for run in plan_in(tmp_path, again=True).runs if run.record() is None]
    assert [run.path for run in missing] == [first.path] and missing[0].launched[-1] == "rerun=true"
    assert "rerun" not in missing[0].command


@pytest.mark.parametrize("dirty", [False, True])
def test_records_of_uncommitted_code_are_run_again_from_a_clean_commit(tmp_path, monkeypatch, dirty):
    plan = plan_in(tmp_path)
    finish(plan, distance)
    [first, *_] = plan.runs
    record = records.read_record(first.path)
    record["segments"][0]["git"]["dirty"] = True
    records.write_json(first.path / records.RECORD, record)
    monkeypatch.setattr(fingerprint, "git", lambda: {"commit": "a" * 40, "dirty": dirty})
    missing = [run.path for run in plan_in(tmp_path, again=True).runs if run.record() is None]
    assert missing == ([] if dirty else [first.path])  # changes that are still there would be recorded once more


def test_measuring_again_asks_for_the_data_first(root):
    import subprocess

    done = subprocess.run(["bash", "scripts/measure.sh"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert_names(done.stderr, "scripts/measure.sh")


def test_a_run_that_does_not_say_has_the_one_gpu_that_the_pool_gives_it(tmp_path):
    """Not all that the planning process sees: ranks are part of what a run is."""
    for text in (SPEC.replace(", num_gpus=0", ""), SPEC.replace("num_gpus=0", "num_gpus=auto")):
        silent = plan_in(tmp_path, text, gpus=1).runs
        assert all("num_gpus=1" in run.overrides and run.cfg.num_gpus == run.cfg.ranks == 1 for run in silent)
    asked = Plan([experiment(tmp_path)], "full", extra=["++num_gpus=auto"], gpus=1).runs
    assert all(run.overrides[0] == "num_gpus=1" and run.cfg.num_gpus == 1 for run in asked)
    assert all(run.cfg.num_gpus == 0 and run.cfg.ranks == 1 for run in plan_in(tmp_path, gpus=1).runs)


def test_times_may_be_those_of_another_profile(tmp_path):
    """Long runs go side by side, and what a step costs is measured by short ones that do not."""
    profiles = (
        "  long: {seeds: [1, 2, 3], timed: false, metrics: {step: {profile: times}}}\n"
        "  times: {seeds: [1, 2, 3], grid: false, overrides: [max_steps=4]}\n"
    )
    spec = make_experiment(tmp_path, SPEC + profiles)
    assert not spec.profile("long").timed and spec.profile("times").timed

    def rows(profile, optim, step_ms, jobs):
        part = make_row({})["segments"][0] | {"step_ms": step_ms, "load": [0.9, 0.9]}
        timing = {"command": profile, "jobs": jobs}
        return [make_row({"optim": optim}, seed, profile=profile, segments=[part], timing=timing)
                for seed in (1, 2, 3)]  # fmt: skip

    long = [*rows("long", "sgd", 5.0, 2), *rows("long", "adam", 5.0, 2)]
    table = build(
        spec, spec.profile("long"), [*long, *rows("times", "sgd", 2.0, 1), *rows("times", "adam", 3.0, 1)], None
    )
    adam = table.entry({"optim": "adam"})
    assert (adam.numbers["step"].value, adam.numbers["step"].n, adam.numbers["error"].n) == (1.5, 3, 3)
    assert [row["profile"] for row in table.rows] == [*["long"] * 6, *["times"] * 6]
    assert build(spec, spec.profile("long"), long).entry({"optim": "adam"}).numbers["step"].status == "not run"
    with pytest.raises(ConfigError) as caught:
        make_experiment(tmp_path, SPEC + profiles.replace("profile: times", "profile: time"))
    assert (caught.value.value, caught.value.valid) == ("time", ("full", "times"))
    with pytest.raises(ConfigError) as caught:
        make_experiment(tmp_path, SPEC + profiles.replace("metrics: {step: {profile: times}}", "trial_seeds: 1"))
    assert caught.value.value is False


SIZES = SPEC.replace("rows: [optim]", "rows: [size, optim]").replace(
    "axes:\n", "axes:\n  size: {values: {small: {overrides: [batch_size=64]}, large: {overrides: [batch_size=128]}}}\n"
)


def test_search_of_some_cells(tmp_path):
    plan = plan_in(tmp_path, SIZES, only={"size": ["small"]})
    finish(plan, distance)
    while grow(plan):
        finish(plan, distance)
    assert {one.key["size"] for one in plan.samples} == {"small"}
    assert rates(plan, "sgd", seed=4) == [1.6] and rates(plan, "adam", seed=4) == [0.002]


def test_trials_may_take_more_seeds_where_validation_is_noisier(tmp_path):
    text = SIZES.replace("trial_seeds: 2", "trial_seeds: {size: {small: 3, large: 1}}")
    plan = plan_in(tmp_path, text)
    assert finish(plan, distance) == 2 * 3 * (3 + 1)  # optimizers, points, trial seeds
    while grow(plan):
        finish(plan, distance)
    seeds = {size: {one.run.cfg.seed for one in plan.samples if one.key["size"] == size and
                    one.point != {"optim.lr": BEST[one.key["optim"]]}} for size in ("small", "large")}  # fmt: skip
    assert seeds == {"small": {1, 2, 3}, "large": {1}}
    with pytest.raises(ConfigError) as caught:
        plan_in(tmp_path, text.replace("large: 1}}", "large: 9}}"))
    assert caught.value.key.endswith("trial_seeds") and caught.value.value == 9
