"""What a run does besides stepping: schedules, accumulation, wrappers, selection, targets, divergence, records."""

import math

import pytest
import torch
from omegaconf import OmegaConf

import koala
from koala.runs import compose, find_record
from koala.training.evaluation import WeightAverage
from koala.training.optimizers import build_schedule, milestones
from tests.refused import refused
from tests.training.conftest import closest


def test_accumulation_is_the_same_step(runs):
    full, pieces = ["precision=fp64", "max_steps=8"], ["precision=fp64", "max_steps=8", "accumulation=5"]
    runs.launch(*full)
    runs.launch(*pieces)
    assert closest(runs.weights(*full), runs.weights(*pieces)) < 1e-12


@pytest.mark.parametrize(
    "epochs, expected",
    [(100, [30, 60, 90]), (200, [60, 120, 160]), (10, [3, 6, 9]), (150, [45, 90, 135]), (400, [120, 240, 320])],
)
def test_milestones_of_the_paper_and_scaled_to_other_lengths(epochs, expected):
    cfg = compose(["data=cifar100", f"epochs={epochs}"])
    assert milestones(cfg.schedule, epochs) == expected


def test_cifar10_has_milestones_of_its_own():
    assert milestones(compose(["data=cifar10", "epochs=200"]).schedule, 200) == [150]
    assert milestones(compose(["data=cifar10", "schedule.milestones=[5,7]"]).schedule, 200) == [5, 7]


def cosine(share: float, floor: float = 0.0) -> float:
    return floor + (0.1 - floor) * (1 + math.cos(math.pi * share)) / 2


RISE = [0.1 * (0.1 + 0.09 * step) for step in range(10)]
RATES = {  # of 4 epochs of 10 steps
    "constant": ([], [0.1] * 40),
    "step": (["schedule.milestones=[2,3]", "schedule.gamma=0.1"], [0.1] * 20 + [0.01] * 10 + [1e-3] * 10),
    "cosine": ([], [cosine(step / 40) for step in range(40)]),
    "cosine by epochs": (["schedule.by=epoch"], [cosine(step // 10 / 4) for step in range(40)]),
    "cosine cut short": (["schedule.length=8"], [cosine(step / 80) for step in range(40)]),
    "cosine that falls and rises": (["schedule.length=2"], [cosine(step / 20) for step in range(40)]),
    "cosine with a floor": (["schedule.final=0.1"], [cosine(step / 40, 0.01) for step in range(40)]),
    "cosine with warm-up": (["schedule.warmup=1"], [*RISE, *(cosine(step / 30) for step in range(30))]),
}


@pytest.mark.parametrize("case", RATES)
def test_the_rate_of_every_step_follows_the_schedule(case):
    overrides, expected = RATES[case]
    cfg = compose(["data=digits", f"schedule={case.split()[0]}", *overrides])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule, by = build_schedule(cfg.schedule, optimizer, 4, 10)
    rates = []
    for step in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if by == "step" or step % 10 == 9:
            schedule.step()
    assert rates == pytest.approx(expected, abs=1e-12)


def test_a_plateau_waits_for_its_patience_and_any_improvement_counts():
    cfg = compose(["data=digits", "schedule=plateau", "schedule.patience=1", "schedule.gamma=0.5"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule, _ = build_schedule(cfg.schedule, optimizer, 4, 10)
    rates = []
    for loss in (1.0, 1.0 - 1e-6, 1.0, 1.0, 1.0):
        schedule.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.05]


def test_a_run_takes_the_rates_of_its_schedule(runs):
    overrides = ["optim=sgd", "optim.lr=0.1", "schedule=cosine", "schedule.by=epoch", "epochs=2"]
    runs.launch(*overrides)
    # rows are written after the epoch's last step of the schedule
    assert [row["lr"] for row in runs.history(*overrides)] == pytest.approx([0.05, 0.0], abs=1e-12)


def test_a_diverged_run_is_recorded_and_exits_with_3(run_door, tmp_path):
    overrides = ["data=digits", "model=mlp", "logger=none", "optim=sgd", "optim.lr=1e8", "num_gpus=0", "epochs=50"]
    done = run_door("train.py", *overrides)
    assert done.returncode == 3, done.stderr
    record = find_record(compose([*overrides, f"output_root={tmp_path / 'outputs'}"]))
    assert record["status"] == "diverged" and record["error"]


def test_targets_record_where_they_were_first_reached(runs):
    overrides = ["optim=adam", "optim.lr=1e-2", "epochs=5"]
    record = runs.launch(*overrides, "targets={train_loss: 1.0, test_top1_error: 0.0}")
    first = next(row for row in runs.history(*overrides) if row["train_loss"] <= 1.0)
    reached = {"target": 1.0, **{key: first[key] for key in ("epoch", "step", "seconds")}}
    assert record["targets"] == {"train_loss": reached, "test_top1_error": None}


def test_best_values_are_the_lowest_of_the_history(runs):
    record = runs.launch("optim=adam", "epochs=3")
    history = runs.history("optim=adam", "epochs=3")
    for key in ("val_loss", "test_top1_error"):
        assert record["metrics"]["best"][key]["value"] == min(row[key] for row in history)
        assert record["metrics"]["final"][key] == history[-1][key]


def test_selection_on_validation_tests_the_best_epoch_once(runs):
    overrides = ["optim=adam", "optim.lr=0.03", "epochs=6", "select=best-val"]
    record = runs.launch(*overrides)
    history = runs.history(*overrides)
    assert not any(key.startswith("test_") for row in history for key in row)
    best = min(history, key=lambda row: row["val_loss"])
    assert record["metrics"]["final"]["selected_epoch"] == best["epoch"]
    watched = ["optim=adam", "optim.lr=0.03", "epochs=6", "select=last"]
    runs.launch(*watched)
    at_best = next(row for row in runs.history(*watched) if row["epoch"] == best["epoch"])
    assert record["metrics"]["final"]["test_loss"] == at_best["test_loss"]


def test_a_schedule_of_what_has_no_rate_is_refused():
    cfg, optimizer = compose(["data=digits", "schedule=step"]), koala.DiagonalEKF(torch.nn.Linear(2, 2).parameters())
    with refused("schedule", "step"):
        build_schedule(cfg.schedule, optimizer, 10, 10)


def test_swa_evaluates_the_average_of_the_weights(runs):
    """After the second of two averaged epochs the average is the mean of the two epochs' weights."""
    overrides = "optim=sgd optim.lr=0.01 wrapper=swa wrapper.start=0.5 wrapper.every=1 schedule=constant".split()
    runs.launch(*overrides, "epochs=2")
    state = torch.load(runs.checkpoints(*overrides, "epochs=2")[-1], weights_only=True)
    assert int(state["evaluation"]["average"]["n_averaged"]) == 2
    first = ["optim=sgd", "optim.lr=0.01", "schedule=constant", "epochs=1"]
    runs.launch(*first)
    after_one, after_two = runs.weights(*first), state["model"]
    for name, average in ((name, state["evaluation"]["average"][f"module.{name}"]) for name in after_two):
        assert torch.allclose(average, (after_one[name] + after_two[name]) / 2, atol=1e-7)


def test_an_average_is_evaluated_with_batch_statistics_of_its_own():
    net, images = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.randn(32, 3)
    average = WeightAverage(net, OmegaConf.create({"wrapper": {"start": 0.0, "every": 1}, "epochs": 2}))
    for epoch in (1, 2):
        average.after_epoch(net, epoch)
        net[0].weight.data.add_(1)
    evaluated = average.evaluated(net, [images])
    torch.testing.assert_close(evaluated[1].running_mean, evaluated[0](images).mean(0))
    assert not average.average.module[1].running_mean.any() and not net[1].running_mean.any()


def test_the_average_that_validates_best_is_tested(runs):
    overrides = ["optim=adam", "optim.lr=0.03", "wrapper=swa", "wrapper.start=0.5", "wrapper.every=1", "epochs=4"]
    record = runs.launch(*overrides, "select=best-val")
    history = runs.history(*overrides, "select=best-val")
    best = min(history, key=lambda row: row["val_loss"])
    assert record["metrics"]["final"]["selected_epoch"] == best["epoch"] >= 3  # of averages
    runs.launch(*overrides, "select=last")
    at_best = next(row for row in runs.history(*overrides, "select=last") if row["epoch"] == best["epoch"])
    assert record["metrics"]["final"]["test_loss"] == pytest.approx(at_best["test_loss"], rel=1e-5)


def test_lookahead_pulls_the_weights_back_every_k_steps(runs):
    """With alpha = 0 the slow weights never move, so after k steps the run is where it began."""
    start = runs.launch("optim=koala-m", "max_steps=1", "optim.lr=0")
    assert start["status"] == "finished"
    overrides = ["optim=koala-m", "wrapper=lookahead", "wrapper.alpha=0.0", "wrapper.k=4", "max_steps=4"]
    runs.launch(*overrides)
    moved = ["optim=koala-m", "wrapper=lookahead", "wrapper.alpha=0.0", "wrapper.k=5", "max_steps=4"]
    runs.launch(*moved)
    initial = runs.weights("optim=koala-m", "max_steps=1", "optim.lr=0")
    assert all(torch.equal(initial[name], weight) for name, weight in runs.weights(*overrides).items())
    assert not all(torch.equal(initial[name], weight) for name, weight in runs.weights(*moved).items())


def test_lbfgs_on_the_whole_set_descends(runs):
    overrides = ["optim=lbfgs", "batch_size=1257", "epochs=5", "data.crop_padding=0"]
    record = runs.launch(*overrides)
    losses = [row["train_loss"] for row in runs.history(*overrides)]  # the closure's first values, at the old weights
    assert record["status"] == "finished" and losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(10), rel=0.1) and losses[-1] < 1.0


@pytest.mark.parametrize("optim, per_weight", [("adam", 8), ("sgd", 4), ("koala-m", 8), ("sgdf", 8), ("koala-v", 0)])
def test_the_record_says_what_the_optimizer_keeps(runs, optim, per_weight):
    record = runs.launch(f"optim={optim}", "max_steps=2")
    local = record["state_bytes"] - per_weight * record["parameters"]
    assert 0 <= local < 200  # numbers of a tensor or of the filter, whatever the network's size


def test_the_record_says_where_its_numbers_come_from(runs):
    record = runs.launch("optim=koala-v", "seed=3")
    assert record["seed"] == 3 and record["precision"] == "fp32" and record["world_size"] == 1
    assert record["versions"]["torch"] == torch.__version__ and record["device"].startswith("CPU")
    assert set(record["git"]) == {"commit", "dirty"} and record["command"]
    assert record["seconds"]["train"] > 0 and record["throughput"] > 0 and record["peak_memory_bytes"] > 0
    assert record["steps"] == 38 and record["epochs"] == 2
