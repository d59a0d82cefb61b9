"""Image classifiers: torchvision's own networks are the truth, apart from the stem."""

import math

import pytest
import torch
import torchvision
import yaml
from torch import nn

from koala.models import build
from tests.refused import refused

SMOKE = {  # what makes each network train on digits in a second or two
    "resnet10": {}, "resnet18": {"width": 8}, "resnet50": {"width": 4, "layers": [1, 1, 1, 1]},
    "resnet101": {"width": 4, "layers": [1, 1, 2, 1]}, "wrn50-2": {"width": 4, "layers": [1, 1, 1, 1]},
    "densenet121": {"width": 8, "layers": [1, 2, 2, 1]}, "mobilenetv3": {"width": 4},
    "swin-tiny": {"width": 16, "layers": [1, 1]}, "mlp": {},
    "densenet121-released": {"width": 8, "layers": [1, 2, 2, 1]}, "mobilenetv3-released": {"width": 4},
    "swin-tiny-released": {"width": 16, "layers": [1, 2, 1, 2]}, "vgg11": {"width": 8, "init": "kaiming-normal"},
    "vit-b32": {"width": 16, "layers": [2], "heads": 2, "patch": 4, "pretrained": None},
}  # fmt: skip


@pytest.fixture
def config(root):
    return lambda name, **keys: yaml.safe_load((root / f"configs/model/{name}.yaml").read_text()) | keys


def make(cfg, classes=10, channels=3, size=32):
    return build(cfg, kind="images", num_classes=classes, input_shape=(channels, size, size))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "constructor", "stem_channels"),
    [
        ("resnet18", "resnet18", 64),
        ("resnet50", "resnet50", 64),
        ("resnet101", "resnet101", 64),
        ("wrn50-2", "wide_resnet50_2", 64),
        ("densenet121", "densenet121", 64),
        ("mobilenetv3", "mobilenet_v3_large", 16),
    ],
)
def test_parameters_are_torchvisions_but_for_the_stem(config, name, constructor, stem_channels):
    with torch.device("meta"):
        truth = parameters(getattr(torchvision.models, constructor)(num_classes=100))
        kernel = 3 if name == "mobilenetv3" else 7
        difference = 3 * stem_channels * (kernel**2 - 3**2)
        assert parameters(make(config(name), classes=100)) == truth - difference
        assert parameters(make(config(name), classes=100, size=224)) == truth
        assert (
            parameters(make(config(name), classes=100, channels=1, size=224)) == truth - 2 * stem_channels * kernel**2
        )


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("resnet101", 42_512_970),
        ("densenet121-released", 6_956_298),
        ("mobilenetv3-released", 70_045_738),
        ("swin-tiny-released", 26_598_166),
        ("vgg11", 9_750_922),
    ],
)
def test_released_networks_have_as_many_weights_as_were_counted(config, name, weights):
    with torch.device("meta"):
        assert parameters(make(config(name))) == weights


@pytest.mark.parametrize("depth", ["11", "13"])
def test_vggs_for_imagenet_are_torchvisions(config, depth):
    model = make(config(f"vgg{depth}-bn", width=4), size=224).eval()
    with torch.device("meta"):
        truth = getattr(torchvision.models, f"vgg{depth}_bn")(num_classes=10)
        full = make(config(f"vgg{depth}-bn"), size=224)
    assert [p.shape for p in full.parameters()] == [p.shape for p in truth.parameters()]
    kinds = [type(module) for module in truth.modules() if not list(module.children())]
    assert [
        type(module) for module in model.modules() if not list(module.children()) and not isinstance(module, nn.Flatten)
    ] == kinds
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 10)


def test_sgdfs_two_heads_of_vgg11_drop_out_where_their_scripts_do(config):
    for head, order in (
        ("sgdf-cifar10", [nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Linear]),
        ("sgdf-cifar100", [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]),
    ):
        model = make(config("vgg11", head=head), classes=100)
        assert [type(module) for module in model[-1]] == order
        spread = model[-1][-1].weight.std().item()
        assert abs(spread - (0.01 if head == "sgdf-cifar100" else 512**-0.5 / 3**0.5)) < 0.001


def test_released_mobilenetv3_has_full_convolutions_on_maps_of_32_32_16_8_4(config):
    model = make(config("mobilenetv3-released", width=4))
    assert all(module.groups == 1 for module in model.modules() if isinstance(module, nn.Conv2d))
    sides, maps = [], torch.randn(2, 3, 32, 32)
    for block in model.features:
        maps = block(maps)
        sides.append(maps.shape[-1])
    assert sorted(set(sides), reverse=True) == [32, 16, 8, 4] and sides[:4] == [32, 32, 32, 32]
    assert not [name for name, _ in model.named_parameters() if "gate" in name and name.endswith("bias")]


@pytest.mark.parametrize("block", [0, 1], ids=["plain", "shifted"])
def test_released_swin_attends_as_torchvisions_does_under_one_table_for_all_heads(config, block):
    from torchvision.models.swin_transformer import shifted_window_attention

    torch.manual_seed(0)
    model = make(config("swin-tiny-released", width=64)).double()
    attention = [module for module in model.modules() if hasattr(module, "qkv")][block]
    maps = torch.randn(2, 16, 16, 64, dtype=torch.float64)
    offsets = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    apart = offsets[None] - offsets[:, None] + 1
    table = attention.positions[apart[..., 0], apart[..., 1]]
    truth = shifted_window_attention(
        maps, attention.qkv.weight, attention.out.weight, table[None, None], [2, 2], 2, [block, block],
        proj_bias=attention.out.bias,
    )  # fmt: skip
    torch.testing.assert_close(attention(maps), truth, rtol=0, atol=1e-12)


def test_the_released_dense_stem_is_a_convolution_alone(config):
    features = make(config("densenet121-released", layers=[1, 1])).features
    assert [type(part) for part in features[:4]] == [nn.Conv2d, nn.Identity, nn.Identity, nn.Identity]


def test_mobilenetv3_is_torchvisions_with_second_derivatives(config):
    """AdaHessian differentiates the gradient once more, which torch's hard swish does not allow."""
    model = make(config("mobilenetv3"), classes=10, size=224).eval()
    truth = torchvision.models.mobilenet_v3_large(num_classes=10).eval()
    truth.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(images), truth(images))
    weights = model.classifier[0].weight
    (gradient,) = torch.autograd.grad(model(images).square().sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weights)
    assert second.abs().sum() > 0


def test_swin_has_torchvisions_parameters_but_for_patches_and_windows(config):
    with torch.device("meta"):
        truth = parameters(torchvision.models.swin_t(num_classes=100))
        small = parameters(make(config("swin-tiny"), classes=100))
        assert parameters(make(config("swin-tiny"), classes=100, size=224)) == truth
    heads, depth = (3, 6, 12, 24), (2, 2, 6, 2)
    positions = (2 * 7 - 1) ** 2 - (2 * 4 - 1) ** 2  # entries of the relative position table of each head
    assert truth - small == 3 * 96 * (4**2 - 2**2) + positions * sum(h * d for h, d in zip(heads, depth, strict=True))


def test_a_resnet_for_large_images_is_torchvisions_own(config):
    model = make(config("resnet18"), classes=7, size=64).eval()
    truth = torchvision.models.resnet18(num_classes=7).eval()
    truth.load_state_dict(model.state_dict())  # the same names and shapes
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), truth(images))


def test_the_small_stem_keeps_the_resolution(config):
    model = make(config("resnet18", width=8))
    images = torch.randn(2, 3, 32, 32)
    stem = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    assert stem.shape == (2, 8, 32, 32)
    assert model.layer4(model.layer3(model.layer2(model.layer1(stem)))).shape == (2, 64, 4, 4)
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.bias) == ((3, 3), (1, 1), None)


def test_width_scales_every_stage(config):
    shapes = [
        {name: p.shape for name, p in make(config("resnet50", width=width)).named_parameters()} for width in (64, 16)
    ]
    for name, wide in shapes[0].items():
        narrow = shapes[1][name]
        assert narrow[0] == (wide[0] if name.startswith("fc") else wide[0] // 4), name
        if len(wide) > 1 and name != "conv1.weight":
            assert narrow[1] == wide[1] // 4, name


@pytest.mark.parametrize("name", SMOKE)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_every_architecture_trains_on_small_images(config, name, channels, size):
    torch.manual_seed(0)
    model = make(config(name, **SMOKE[name]), channels=channels, size=size)
    images, labels = torch.randn(12, channels, size, size), torch.arange(12) % 10
    logits = model(images)
    assert logits.shape == (12, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr={"swin-tiny-released": 1e-3, "vgg11": 3e-3}.get(name, 1e-2))
    losses = []
    if name == "vgg11":
        model.eval()  # it has dropout and no batch statistics
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.6 * losses[0]


def test_the_mlp_has_no_statistics_over_the_batch(config):
    model = make(config("mlp"), channels=1, size=8).double()
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(model(images), torch.cat([model(images[:2]), model(images[2:])]), rtol=1e-14)
    assert not list(model.buffers())


# standard deviation of a weight with `inn` inputs and `out` outputs of its receptive field
SPREAD = {
    "default": lambda inn, out: math.sqrt(2 / out),
    "torch": lambda inn, out: math.sqrt(1 / (3 * inn)),
    "kaiming-normal": lambda inn, out: math.sqrt(2 / out),
    "kaiming-uniform": lambda inn, out: math.sqrt(2 / out),
    "xavier-normal": lambda inn, out: math.sqrt(2 / (inn + out)),
    "xavier-uniform": lambda inn, out: math.sqrt(2 / (inn + out)),
}


@pytest.mark.parametrize("init", SPREAD)
def test_initialisations_have_the_spread_of_their_names(config, init):
    torch.manual_seed(0)
    for module in make(config("resnet18", width=32, init=init)).modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] ** 2
            expected = SPREAD[init](module.in_channels * area, module.out_channels * area)
            deviations = 4 * expected / math.sqrt(2 * module.weight.numel())
            assert abs(module.weight.std().item() - expected) < deviations
            largest = module.weight.abs().max().item() / expected
            uniform = "uniform" in init or init == "torch"
            assert largest <= math.sqrt(3) + 1e-4 if uniform else largest > math.sqrt(3)


def test_orthogonal_rows(config):
    for module in make(config("resnet18", width=8, init="orthogonal")).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            rows = module.weight.flatten(1)
            rows = rows if rows.shape[0] <= rows.shape[1] else rows.T
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def test_weights_follow_the_global_seed(config):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(make(config("densenet121", **SMOKE["densenet121"])).state_dict())
    same = [torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True)]
    assert all(same)
    assert not torch.equal(models[0]["features.conv0.weight"], models[2]["features.conv0.weight"])


@pytest.mark.parametrize(
    ("name", "keys", "key", "value"),
    [
        ("resnet18", {"width": 0}, "model.width", 0),
        ("resnet18", {"width": "wide"}, "model.width", "wide"),
        ("resnet18", {"init": "zeros"}, "model.init", "zeros"),
        ("resnet18", {"family": "unet"}, "model.family", "unet"),
        ("resnet18", {"block": "dense"}, "model.block", "dense"),
        ("resnet18", {"layers": [2, 2, 2]}, "model.layers", [2, 2, 2]),
        ("resnet18", {"layers": [2, 2, 0, 2]}, "model.layers.2", 0),
        ("resnet18", {"width_per_group": 0}, "model.width_per_group", 0),
        ("resnet18", {"block": "basic", "width_per_group": 128}, "model.width_per_group", 128),
        ("resnet18", {"deptth": 3}, "model.deptth", None),
        ("resnet18", {"kind": "smell"}, "model.kind", "smell"),
        ("swin-tiny", {"layers": [1]}, "model.layers", [1]),
        ("swin-tiny", {"width": 80}, "model.width", 80),
        ("swin-tiny-released", {"layers": [2, 2]}, "model.merging", [2, 2, 2, 1]),
        ("densenet121", {"layers": []}, "model.layers", []),
        ("vgg11", {"depth": "12"}, "model.depth", "12"),
        ("vit-b32", {"heads": 7}, "model.width", 768),
        ("vit-b32", {"patch": 5, "pretrained": None}, "model.patch", 5),
        ("vit-b32", {"init": "orthogonal"}, "model.init", "orthogonal"),
    ],
)
def test_a_bad_config_is_refused_by_key_and_value(config, name, keys, key, value):
    with refused(key, value):
        make(config(name, **keys))


def test_an_image_model_refuses_text_and_oblong_images(config):
    with refused("model", "resnet18", mentions="text"):
        build(config("resnet18"), kind="text", num_classes=100, input_shape=(35,))
    with refused("model", "resnet18", mentions="8x16"):
        build(config("resnet18"), kind="images", num_classes=10, input_shape=(3, 8, 16))
