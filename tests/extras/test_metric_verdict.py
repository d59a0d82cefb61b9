"""The rules by which the study of the filter in a metric is decided."""

import importlib.util
import math
from types import SimpleNamespace

import pytest

from koala.tables.samples import Trial
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("metric_verdict", ROOT / "scripts" / "metric_verdict.py")
verdict = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verdict)

LOW = dict(enumerate([10.0, 11.0, 12.0, 13.0, 14.0]))
HIGH = {seed: value + 3 + seed / 10 for seed, value in LOW.items()}


def test_holm_by_hand():
    assert verdict.holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])


@pytest.mark.parametrize(
    ("tasks", "seeds", "answer"), [(7, 5, "no"), (6, 5, "not measured"), (7, 4, "not measured"), (1, 1, "not measured")]
)
def test_no_verdict_before_every_task_has_its_seeds(tasks, seeds, answer, capsys):
    low, high = ({seed: runs[seed] for seed in range(seeds)} for runs in (LOW, HIGH))
    verdict.show("pair", dict.fromkeys(map(str, range(tasks)), high), dict.fromkeys(map(str, range(tasks)), low), 0)
    assert capsys.readouterr().out.startswith(f"pair: {answer}")


def test_tasks_are_counted_after_holm():
    better, worse, lines = verdict.pairs({"a": LOW, "b": HIGH, "c": LOW}, {"a": HIGH, "b": LOW, "c": LOW})
    assert (better, worse, len(lines)) == (1, 1, 3)


def trial(rate, *rows):
    return Trial({"optim.lr": rate}, [], list(rows), list(rows))


def perplexity(value):
    return {"status": "finished", "metrics": {"best": {"val_ppl": {"value": value}}}}


def error(value):
    return {"status": "finished", "metrics": {"final": {"val_top1_error": value}}}


def test_the_one_rate_is_good_on_all_tasks_on_average():
    trials = {
        "digits": [trial(1, error(8.0)), trial(2, error(2.0)), trial(4, error(0.0)), trial(3, error(0.0))],
        "ptb-gpt": [trial(1, perplexity(60.0)), trial(2, perplexity(70.0)), trial(4, perplexity(900.0))],
    }
    assert verdict.one_rate(trials) == 2  # 3 was tried on one task alone
    trials["ptb-gpt"][1] = trial(2, perplexity(70.0), {"status": "diverged"})
    assert verdict.one_rate(trials) == 4  # 0 counts as half an image: 900 x 0.28 < 60 x 8
    trials["ptb-gpt"][2] = trial(4, {"status": "finished", "metrics": {"best": {}}})
    assert verdict.one_rate(trials) == 1  # a perplexity that was never finite is no better than divergence


def test_no_error_counts_as_half_an_image():
    trials = {"digits": [trial(1, error(0.0)), trial(2, error(100 / 360))]}
    assert verdict.one_rate(trials) == 1
    trials["digits"] = [trial(1, error(0.4)), trial(2, error(0.0), error(0.5))]
    assert verdict.one_rate(trials) == 2


def test_the_mean_over_tasks_is_geometric_and_of_seeds_that_all_tasks_have():
    samples = {"digits": {1: 0.0, 2: 1.0, 3: 2.0}, "ptb-gpt": {1: 72.0, 2: 64.0}, "cifar10": {1: 40.0, 2: math.inf}}
    assert verdict.geometric(samples) == pytest.approx({1: (50 / 360 * 72 * 40) ** (1 / 3), 2: math.inf})


def test_given_rates_are_held_against_the_best_of_all_that_were_tried():
    losses = {1: 2.0, 2: 1.0, 4: 1.09, 8: None, 3: 0.95}  # 8 diverged; 3 was added
    trials = [Trial({"optim.lr": rate}, [loss], [], []) for rate, loss in losses.items()]
    cell = SimpleNamespace(settings=[({"optim.lr": rate}, ()) for rate in (1, 2, 4, 8)])
    assert verdict.tolerated(SimpleNamespace(cell=cell, trials=trials)) == 1
