"""What a run is said to cost before it is run."""

import pytest
from omegaconf import OmegaConf

from koala.reproduce.estimate import Rate, _key, _what, estimate, flops_per_sample, measured_rates, paper_rate
from koala.runs import compose
from koala.tables.measured import collect
from tests.tables.synthetic import make_row


@pytest.mark.extended
def test_flops_of_a_linear_model_and_of_the_papers_network():
    cfg = compose(
        ["data=digits", "model=mlp", "model.width=32", "model.layers=[1]", "optim=sgd", "epochs=2", "num_gpus=1"]
    )
    cost = estimate(cfg, {})
    forward = 2 * (64 * 32 + 32 * 10)  # two operations a weight
    backward = 2 * forward - 2 * 64 * 32  # the inputs get no gradient
    assert cost.flops == 2 * (1257 * (forward + backward) + 540 * forward)
    assert cost.hours == pytest.approx(cost.flops / paper_rate() / 3600)
    assert 1e12 < paper_rate() < 2e13  # a GPU of 2021
    flops_per_sample.cache_clear()


def test_measured_throughput_replaces_the_papers():
    cfg = compose(["data=digits", "model=mlp", "optim=sgd", "epochs=10", "num_gpus=0"])
    assert estimate(cfg, {}) is None  # nothing is known of a CPU
    config = OmegaConf.to_container(cfg, resolve=True)
    cost = estimate(cfg, {_what(True, config): Rate(1000.0, "a CPU", config)})
    assert cost.source == "measured on a CPU"
    assert cost.hours * 3600 == pytest.approx(12.57, rel=0.2)  # 10 x 1257 images at 1000 a second, and evaluation


def test_every_run_is_evaluated_at_its_end_and_as_often_as_it_asks():
    mlp = ["data=digits", "model=mlp", "optim=sgd", "num_gpus=1", "batch_size=64"]
    forward, both = flops_per_sample(_key(compose(mlp)))
    cost = lambda *more: estimate(compose([*mlp, *more]), {}).flops  # noqa: E731
    assert cost("max_steps=1") == pytest.approx(64 * both + 540 * forward)
    assert cost("epochs=3", "eval_every=2") == 3 * 1257 * both + 2 * 540 * forward
    assert cost("optim=lbfgs", "optim.max_iter=5") > 4 * cost()
    config = OmegaConf.to_container(compose([*mlp, "num_gpus=0"]), resolve=True)
    rates = {_what(True, config): Rate(1000.0, "CPU", config)}
    hours = lambda *more: estimate(compose([*mlp, "num_gpus=0", *more]), rates).hours  # noqa: E731
    assert hours("optim=lbfgs", "optim.max_iter=5") > 4 * hours()  # the rate is of one pass a batch


def test_rows_of_networks_that_are_no_more_are_no_rates(tmp_path):
    config = OmegaConf.to_container(compose(["data=digits", "model=mlp", "num_gpus=0"]), resolve=True)
    gone = config | {"model": {"name": "gone", "kind": "vision", "family": "gone"}}
    before_width_was_a_key = config | {"model": {key: value for key, value in config["model"].items() if key != "init"}}
    rows = [make_row({}, seed, config=kept) for seed, kept in enumerate((gone, before_width_was_a_key))]
    collect(tmp_path, [{**row, "table": "other"} for row in rows])
    (rate,) = measured_rates(tmp_path).values()
    assert rate.config["model"] == config["model"]
    other = compose(["data=digits", "model=resnet18", "model.width=8", "num_gpus=0"])
    assert estimate(other, measured_rates(tmp_path)).source == "FLOP/s of other images on CPU"
