"""Every baseline of configs/optim trains an image and a language model, in bf16, or is refused with its reason; every
optimizer there learns."""

import math

import pytest

import koala
from koala.runs import compose, launch
from koala.runs.schema import options
from tests.refused import refused

NAMES = options("optim")
OUTPUTS = {"diagonal-ekf", "lkf", "loko"}  # these observe outputs; loko is a DiagonalEKF
BASELINES = [name for name in NAMES if name not in {info.name for info in koala.list_optimizers()} | OUTPUTS]
COSTLY = {"shampoo"}  # seconds
SMALL = "model.width=8 max_steps=2 precision=bf16 schedule=constant select=last num_gpus=0 logger=none".split()
KINDS = {
    "images": ["data=digits", "model=resnet10", "batch_size=32", *SMALL],
    "text": ["data=pydocs", "model=gpt1-small", "model.heads=2", "model.layers=1", "model.feedforward=8", *SMALL,
             "model.context=8", "data.bptt=8", "data.vocabulary=100", "batch_size=64"],
}  # fmt: skip

NO_TEXT = {
    "kfac": "models of kind vision",
    "shampoo": "models of kind vision, gan",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    return [f"output_root={folder / 'outputs'}", f"data_root={folder / 'data'}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASELINES)
def test_trains(name, kind, folders):
    if kind == "text" and name in NO_TEXT:
        with refused("optim", name, NO_TEXT[name]):
            compose([f"optim={name}", *KINDS[kind], *folders])
        return
    record = launch(compose([f"optim={name}", *KINDS[kind], *folders]))
    assert record["status"] == "finished" and record["steps"] == 2
    assert math.isfinite(record["metrics"]["final"]["test_loss"])


@pytest.mark.extended
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in COSTLY else n for n in NAMES])
def test_learns_at_the_rate_of_its_file(name, folders):
    """A file that only composes may hold a rate at which nothing moves: Sophia's of 0.001, which its clip makes a
    hundredth of that, leaves the loss at 2.28 after these steps, where chance is log 10 = 2.30. The slowest, Adamax at
    the rate of a paper's long runs, comes to 1.88; most come below 0.5."""
    network = ["data=digits", "model=mlp", "batch_size=64", "max_steps=300", "schedule=constant", "select=last"]
    if name in OUTPUTS:  # as many rows of a Jacobian as a batch has outputs
        network.append("batch_size=4")
    record = launch(compose([f"optim={name}", *network, "num_gpus=0", "logger=none", *folders]))
    assert record["status"] == "finished"
    assert record["metrics"]["final"]["test_loss"] < 2.0
