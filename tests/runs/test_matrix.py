"""Every optimizer of configs/optim on ranks, sharded, compiled, accumulated, clipped and in bf16: it trains, or it is
refused when it is configured, with the reason and with what works."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from koala.errors import ConfigError
from koala.runs import identify
from koala.runs.compose import check
from koala.runs.on_rank import run
from koala.runs.overrides import hydra_config
from koala.runs.schema import options

pytestmark = pytest.mark.extended

NAMES = options("optim")
BASE = ["data=digits", "model=mlp", "logger=none", "num_gpus=0", "batch_size=64", "max_steps=2", "schedule=constant"]
VARIANTS = {
    "alone": {},
    "ranks": {"cpu_procs": 2},
    "sharded": {"cpu_procs": 2, "strategy": "fsdp"},
    "compiled": {"compile": True},
    "accumulated": {"accumulation": 2},
    "clipped": {"grad_clip": 1.0},
    "bf16": {"precision": "bf16"},
}
SECOND_ORDER = ["adahessian", "sophia"]
LAYERS = ["adafisher", "adafisherw", "kfac", "muon"]
OUTPUTS = ["diagonal-ekf", "lkf", "loko"]
FULL = [*LAYERS, "alig", "momo", "momo-adam", "lbfgs", "adamp", "fromage", "prodigy", "shampoo", "soap",
         "metric-identity", "metric-adam", "metric-muon"]  # fmt: skip
REFUSED = {  # way: {optimizer: key at fault}
    "ranks": dict.fromkeys([*SECOND_ORDER, *OUTPUTS], "ranks"),
    "sharded": dict.fromkeys([*SECOND_ORDER, *OUTPUTS], "ranks") | dict.fromkeys(FULL, "strategy"),
    "compiled": dict.fromkeys([*SECOND_ORDER, *LAYERS, *OUTPUTS], "compile"),
    "accumulated": dict.fromkeys(OUTPUTS, "accumulation"),
    "clipped": dict.fromkeys(OUTPUTS, "grad_clip"),
}


def composed(name: str, folder: Path) -> dict:
    """{way: configuration, or the error}."""
    cfg, result = hydra_config([*BASE, f"optim={name}", f"data_root={folder}/data"]), {}
    for way, change in VARIANTS.items():
        try:
            result[way] = check(OmegaConf.merge(cfg, change, {"output_root": f"{folder}/{way}"}))
        except ConfigError as error:
            result[way] = error
    return result


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_training_is_had_or_refused_with_what_works(name, tmp_path):
    result = composed(name, tmp_path)
    refused = {way: error for way, error in result.items() if isinstance(error, ConfigError)}
    assert {way: error.key for way, error in refused.items()} == {
        way: names[name] for way, names in REFUSED.items() if name in names
    }
    assert all(f"optim={name}" in error.reason and error.valid for error in refused.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_refused_trains(name, tmp_path):
    for way, cfg in composed(name, tmp_path).items():
        if not isinstance(cfg, ConfigError) and cfg.cpu_procs == 1:
            assert run(cfg, identify(cfg), None)["status"] == "finished", way
