"""configs/optim against the constructors; the walls around koala.optim."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import koala
from koala.runs import compose
from koala.training.optimizers import build_optimizer

from .cases import net

ROOT = Path(__file__).parents[2]
INFOS = koala.list_optimizers()


@pytest.mark.parametrize("info", [i for i in INFOS if i.observes != "outputs"], ids=lambda info: info.name)
def test_config_leaves_defaults_to_the_class_and_instantiates(info):
    hydra_utils = pytest.importorskip("hydra.utils")
    path = ROOT / "configs" / "optim" / f"{info.name}.yaml"
    config = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# ")
    assert config.pop("name") == info.name
    assert config.keys() == {"_target_", "lr", "weight_decay"}  # one source of the others: the class
    defaults = {p.name: p.default for p in inspect.signature(info.cls).parameters.values()}
    del defaults["params"], defaults["process_group"]
    settings = dict(compose([f"optim={info.name}", "optim.weight_decay=0"]).optim)
    assert {key: settings[key] for key in defaults} == defaults
    assert settings.keys() - defaults.keys() == {"name", "_target_"}
    config["weight_decay"] = 5e-4  # interpolated from the data set
    optimizer = hydra_utils.instantiate(config, net().parameters())
    assert type(optimizer) is info.cls
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4


@pytest.mark.parametrize("info", [i for i in INFOS if i.observes == "outputs"], ids=lambda info: info.name)
def test_config_of_what_observes_outputs_leaves_the_rest_to_the_class(info):
    path = ROOT / "configs" / "optim" / f"{info.name}.yaml"
    config = yaml.safe_load(path.read_text())
    del config["defaults"]  # a schedule without a rate
    assert path.read_text().startswith("# ") and config["name"] == info.name
    run = compose([f"optim={info.name}", "data=digits", "model=mlp"])
    defaults = {p.name: p.default for p in list(inspect.signature(info.cls).parameters.values())[1:]}
    assert dict(run.optim) == {**defaults, **config}
    assert type(build_optimizer(run.optim, run.wrapper, net())) is info.cls
    assert run.schedule.name == "constant"


def test_import_needs_torch_only():
    """Importing koala loads no third-party package that importing torch did not, and nothing of ours but optim."""
    script = (
        "import sys, torch, torch.distributed.tensor; before = set(sys.modules); import koala; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "assert new <= {'koala', 'torch'}, new; "
        "ours = {m for m in sys.modules if m.startswith('koala.')}; "
        "assert all(m.startswith('koala.optim') for m in ours), ours"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
