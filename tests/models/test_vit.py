"""Vision transformers: torchvision's own has as many weights, and pretrained ones arrive where they belong."""

import pytest
import safetensors.torch
import torch
import torchvision
import yaml

from koala.models import build
from tests.refused import refused

SMALL = {"width": 16, "layers": [2], "heads": 2, "patch": 4, "pretrained": None}


@pytest.fixture
def make(root):
    def make(name="vit-b32", size=16, **keys):
        cfg = yaml.safe_load((root / f"configs/model/{name}.yaml").read_text()) | keys
        return build(cfg, kind="images", num_classes=10, input_shape=(3, size, size))

    return make


@pytest.mark.parametrize(
    ("name", "theirs"), [("vit-b16", "vit_b_16"), ("vit-b32", "vit_b_32"), ("vit-l32", "vit_l_32")]
)
def test_weights_are_as_many_as_torchvisions(make, name, theirs):
    with torch.device("meta"):
        ours = make(name, size=384, pretrained=None)
        truth = getattr(torchvision.models, theirs)(image_size=384, num_classes=10)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in truth.parameters())


@pytest.mark.parametrize("where", ["folder", "file"])
def test_pretrained_weights_of_another_resolution_arrive_under_a_head_of_zeros(make, tmp_path, where):
    torch.manual_seed(1)
    first = make(size=16, **SMALL).state_dict()
    first["pos_embed"][:, 1:] = torch.arange(16.0)  # of a table that is constant, any interpolation is that constant
    safetensors.torch.save_file({k: v for k, v in first.items() if "head" not in k}, tmp_path / "model.safetensors")
    source = tmp_path if where == "folder" else tmp_path / "model.safetensors"
    model = make(size=32, **SMALL | {"pretrained": str(source)})
    second = model.state_dict()
    assert not second["head.weight"].any() and not second["head.bias"].any()
    assert second["pos_embed"].shape == (1, 1 + 8 * 8, 16)
    torch.testing.assert_close(second["pos_embed"][:, 1:], torch.arange(16.0).expand(1, 64, 16))
    for name, weight in first.items():
        if not name.startswith(("head", "pos_embed")):
            assert torch.equal(weight, second[name]), name
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_weights_that_do_not_fit_or_may_hold_code_are_refused(make, tmp_path):
    safetensors.torch.save_file(make(**SMALL).state_dict(), tmp_path / "model.safetensors")
    with refused("model.pretrained", str(tmp_path)):
        make(**SMALL | {"pretrained": str(tmp_path), "width": 32})
    torch.save({}, tmp_path / "weights.pth")
    with refused("model.pretrained", str(tmp_path / "weights.pth")):
        make(**SMALL | {"pretrained": str(tmp_path / "weights.pth")})
