"""pytorch-optimizer's classes by the lines of YAML that CONTRIBUTING describes: each trains, or is refused before."""

import inspect

import pytest
import pytorch_optimizer
import torch

from koala.errors import ConfigError
from koala.runs import compose, launch

CLASSES = {
    name: kind
    for name, kind in sorted(vars(pytorch_optimizer).items())
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and "pytorch_optimizer" in kind.__module__
}
# They wrap another optimizer, take a module, need a group of processes, or matrices alone.
REFUSED = set(
    "AdaGO AdaLOMO AdaMuon AdamMini BSAM DeMo DistributedMuon FriendlySAM GSAM LOMO LookSAM Lookahead Muon MuonClip "
    "NorMuon OrthoGrad PCGrad Ranger21 SAM SafeFP16Optimizer ScheduleFreeWrapper SpectralSphere TRAC WSAM".split()
)
QUICK = ("ADOPT", "AdaShift", "AliG", "SOAP", "SpectralSphere", "DeMo")  # defaults that are functions; own closures


def configured(name: str, folder, kind: type | None = None) -> list[str]:
    """Overrides of a run with this class (by default pytorch-optimizer's), whose YAML lies in a folder of its own."""
    keys = inspect.signature(kind or CLASSES[name]).parameters
    target = f"{kind.__module__}.{kind.__name__}" if kind else f"pytorch_optimizer.{name}"
    lines = [f"name: {name}", f"_target_: {target}"]
    lines += [f"{key}: {value}" for key, value in (("lr", "1.0e-3"), ("weight_decay", "0.0")) if key in keys]
    (folder / "optim").mkdir()
    (folder / "optim" / f"{name}.yaml").write_text("\n".join(lines))
    run = ["data=digits", "model=mlp", "schedule=constant", "max_steps=3", "logger=none", "num_gpus=0"]
    return [f"hydra.searchpath=[file://{folder}]", f"optim={name}", *run, f"output_root={folder}/outputs"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSES]
)
def test_it_trains_or_is_refused_before(name, tmp_path):
    overrides = configured(name, tmp_path)
    if name in REFUSED:
        with pytest.raises(ConfigError) as caught:
            compose(overrides)
        assert caught.value.key.startswith("optim") and "\n" not in str(caught.value)
    else:
        record = launch(compose(overrides))
        assert (record["status"], record["steps"]) == ("finished", 3)


def test_a_default_that_yaml_has_no_word_for_is_no_key(tmp_path):
    overrides = configured("ADOPT", tmp_path)
    assert "clip_lambda" not in compose(overrides).optim
    with pytest.raises(ConfigError) as caught:
        compose([*overrides, "optim.clip_lambda=1"])
    assert caught.value.key == "optim.clip_lambda"


@pytest.mark.parametrize("kind", [torch.optim.Muon, pytorch_optimizer.Muon, torch.optim.SparseAdam])
def test_a_class_that_cannot_train_all_weights_is_named(kind, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compose(configured("mine", tmp_path, kind))
    assert caught.value.key == "optim" and kind.__name__ in caught.value.reason
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    if kind.__name__ == "Muon":
        assert "optim=muon" in caught.value.valid
