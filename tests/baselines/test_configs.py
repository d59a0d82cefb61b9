"""Every baseline of configs/optim trains an image and a language model, in bf16, or is refused with its reason."""

import math
from pathlib import Path

import pytest

import koala
from koala.errors import ConfigError
from koala.runs import compose, launch

FOLDER = Path(__file__).parents[2] / "configs" / "optim"
BASELINES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {info.name for info in koala.list_optimizers()})
SMALL = [
    "model.width=8",
    "max_steps=2",
    "precision=bf16",
    "schedule=constant",
    "select=last",
    "num_gpus=0",
    "logger=none",
]
KINDS = {
    "images": ["data=digits", "model=resnet10", "batch_size=32", *SMALL],
    "text": ["data=pydocs", "model=gpt1-small", "model.heads=2", "model.layers=1", "model.feedforward=8", *SMALL,
             "model.context=8", "data.bptt=8", "data.vocabulary=100", "batch_size=64"],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    return [f"output_root={folder / 'outputs'}", f"data_root={folder / 'data'}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASELINES)
def test_trains(name, kind, places):
    if (name, kind) == ("kfac", "text"):
        with pytest.raises(ConfigError, match="optim=kfac: takes vision models only, and model=gpt1-small is not"):
            compose([f"optim={name}", *KINDS[kind], *places])
        return
    record = launch(compose([f"optim={name}", *KINDS[kind], *places]))
    assert record["status"] == "finished" and record["steps"] == 2
    assert math.isfinite(record["metrics"]["final"]["test_loss"])


@pytest.mark.parametrize(("override", "valid"), [("compile=true", "compile=false"), ("strategy=fsdp", "strategy=ddp")])
def test_an_optimizer_of_modules_is_refused_where_they_are_taken_apart(override, valid):
    with pytest.raises(ConfigError, match=f"{override}: optim=adafisher .*; use {valid}"):
        compose(["optim=adafisher", "data=digits", "num_gpus=0", "cpu_procs=2", override])
