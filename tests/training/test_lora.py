"""Low-rank factors beside the frozen weights of an earlier run, trained by filters and by others."""

import pytest
import safetensors.torch
import torch

from koala.models import build
from tests.refused import refused

pytest.importorskip("peft")

BASE = ["model=resnet18", "model.width=4", "model.layers=[1,1,1,1]", "data.validation=0"]
ADAPTED = ["model=resnet18-lora", "model.base.width=4", "model.base.layers=[1,1,1,1]", "model.rank=2", "batch_size=2",
           "data.validation=0"]  # fmt: skip
STEPS = "max_steps=3"


@pytest.fixture
def pretrained(runs):
    """The folder of checkpoints of a short run, and its weights."""
    run = [*BASE, "optim=sgd", "max_steps=5"]
    runs.launch(*run)
    return runs.folder(*run) / "checkpoints", runs.weights(*run)


@pytest.mark.parametrize("optim", ["loko", "adamw", "koala-m"])
def test_factors_and_head_move_and_nothing_else(runs, pretrained, optim):
    folder, before = pretrained
    run = [*ADAPTED, f"model.pretrained={folder}", f"optim={optim}", STEPS]
    assert runs.launch(*run)["status"] == "finished"
    after = {name.removeprefix("network."): value for name, value in runs.weights(*run).items()}
    base = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert base.keys() == before.keys()
    moved = {name for name in before if not torch.equal(base[name], before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    assert all(value.any() for name, value in after.items() if "lora_B" in name)  # they begin at 0


def test_a_head_of_other_classes_is_drawn(runs, pretrained, tmp_path):
    folder, before = pretrained
    state = torch.load(next(folder.glob("step-*")), weights_only=True)
    state["model"]["fc.weight"], state["model"]["fc.bias"] = torch.zeros(7, 32), torch.zeros(7)
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints/step-00000005.pt")
    assert (
        runs.launch(*ADAPTED, f"model.pretrained={tmp_path}/checkpoints", "optim=loko", STEPS)["status"] == "finished"
    )


def test_other_weights_are_another_run(runs, pretrained, tmp_path):
    folder, _ = pretrained
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-1.pt").write_bytes(b"others")
    adapted = [runs.folder(*ADAPTED, "optim=loko", f"model.pretrained={path}")
               for path in (folder, tmp_path / "checkpoints")]  # fmt: skip
    assert adapted[0] != adapted[1]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.targets=[conv9]", "model.targets"),
        ("model.rank=0", "model.rank"),
        ("model.base.width=0", "model.base.width"),
        ("model.pretrained=/nowhere", "model.pretrained"),
        ("model.base.width=8", "model.pretrained"),
        ("model.base.layers=[1,1,1,2]", "model.pretrained"),
    ],
)
def test_what_does_not_fit_is_refused(runs, pretrained, override, key):
    folder, _ = pretrained
    with refused(key):
        runs.launch(*ADAPTED, f"model.pretrained={folder}", "optim=loko", STEPS, override)


VIT = ["width=16", "layers=[2]", "heads=2", "patch=4"]
ADAPTED_VIT = ["model=vit-b16-lora", *(f"model.base.{key}" for key in VIT), "model.rank=2", "batch_size=2"]


@pytest.fixture
def vit(tmp_path):
    """A folder of a small vision transformer's weights for colour images of 12x12, as of the hub; and the weights."""
    keys = {"width": 16, "layers": [2], "heads": 2, "patch": 4, "name": "vit", "kind": "vision", "family": "vit"}
    weights = build(keys, kind="images", num_classes=10, input_shape=(3, 12, 12)).state_dict()
    weights = {name: value for name, value in weights.items() if not name.startswith("head")}
    (tmp_path / "vit").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "vit/model.safetensors")
    return tmp_path / "vit", weights


@pytest.mark.parametrize("optim", ["loko", "adamw"])
def test_a_transformer_starts_from_its_own_weights_and_moves_factors_and_head(runs, vit, optim):
    folder, before = vit
    run = [*ADAPTED_VIT, f"model.base.pretrained={folder}", "data.resize=12", f"optim={optim}", STEPS]
    assert runs.launch(*run)["status"] == "finished"
    after = {name.removeprefix("network."): value for name, value in runs.weights(*run).items()}
    base = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    # The digits are grey: the first layer of the colour images' weights is summed over its channels.
    before["patch_embed.proj.weight"] = before["patch_embed.proj.weight"].sum(1, keepdim=True)
    for name, value in before.items():
        torch.testing.assert_close(base.pop(name), value, rtol=0, atol=1e-6)
    assert base.keys() == {"head.weight", "head.bias"} and all(value.any() for value in base.values())
    factors = {name: value for name, value in after.items() if "lora_B" in name}
    assert len(factors) == 2 and all(value.any() and ".attn.qkv." in name for name, value in factors.items())


def test_a_base_is_known_by_the_content_of_its_weights_wherever_they_lie(runs, vit):
    folder, _ = vit

    def run():
        return runs.folder(*ADAPTED_VIT, "optim=loko", "data.resize=12", f"model.base.pretrained={folder}")

    first, folder = run(), folder.rename(folder.with_name("moved"))
    assert run() == first
    safetensors.torch.save_file({"others": torch.zeros(1)}, folder / "model.safetensors")
    assert run() != first


def test_weights_that_a_base_cannot_have_are_named_by_its_key(runs, vit):
    folder, _ = vit
    given = [*ADAPTED_VIT, "data.resize=12", f"model.base.pretrained={folder}"]
    with refused("model.base.pretrained", str(folder)):
        runs.launch(*given, "model.base.width=32")
    with refused("model.base.patch", 5):
        runs.compose(*given, "model.base.patch=5")
