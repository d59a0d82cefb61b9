"""Low-rank factors beside the frozen weights of an earlier run, trained by filters and by others."""

import pytest
import torch

from koala.errors import ConfigError

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
    ("override", "named"),
    [
        ("model.targets=[conv9]", "conv9"),
        ("model.rank=0", "rank"),
        ("model.base.width=0", "width"),
        ("model.pretrained=/nowhere", "nowhere"),
        ("model.base.width=8", "conv1.weight"),
        ("model.base.layers=[1,1,1,2]", "another network"),
    ],
)
def test_what_does_not_fit_is_refused(runs, pretrained, override, named):
    folder, _ = pretrained
    with pytest.raises(ConfigError, match=named):
        runs.launch(*ADAPTED, f"model.pretrained={folder}", "optim=loko", STEPS, override)
