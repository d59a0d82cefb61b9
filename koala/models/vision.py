"""Image classifiers from torchvision's parts, for images of 32x32 and less as well as ImageNet's.

Images below 64x64 get a small-image stem: the network's first layer keeps the resolution (or, for Swin, cuts
patches of 2x2 instead of 4x4). ``width`` is each family's own measure and scales the whole network.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torchvision
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from koala.errors import ConfigError
from koala.models.resnet import BLOCKS, ResNet

SMALL = 64  # images of fewer pixels a side get the small-image stem

# The initialisations of KOALA's Table 5, and the constructor's own (for ResNets Kaiming normal with fan-out).
INITS: dict[str, Callable[..., Any] | None] = {
    "default": None,
    "xavier-normal": nn.init.xavier_normal_,
    "xavier-uniform": nn.init.xavier_uniform_,
    "kaiming-normal": partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "kaiming-uniform": partial(nn.init.kaiming_uniform_, mode="fan_out", nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
}


@dataclass
class VisionSpec:
    """The keys of an image model's config (configs/model/*.yaml), typed and checked."""

    name: str
    kind: str
    family: str
    width: (
        int  # channels: resnet: of stage 1; densenet: growth rate; mobilenetv3: of the stem; swin: of stage 1
    )
    layers: list[int] = field(default_factory=list)  # of each stage; mlp: one number, its hidden layers
    block: str = "basic"  # resnet: basic | bottleneck
    width_per_group: int = 64  # resnet: 128 for a Wide ResNet-50-2
    init: str = "default"

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> "VisionSpec":
        """Raises ConfigError, naming key, value and what is valid."""
        valid = [item.name for item in fields(cls)]
        if unknown := set(cfg) - set(valid):
            raise ConfigError(f"model.{min(unknown)}: unknown key; an image model has: {', '.join(valid)}")
        try:
            spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(cfg)))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None)
            raise ConfigError(f"model.{key}={cfg.get(key)!r}: {str(error).splitlines()[0]}") from error
        spec._check()
        return spec

    def _check(self) -> None:
        for key, valid in {"family": FAMILIES, "init": INITS, "block": BLOCKS}.items():
            if getattr(self, key) not in valid:
                raise ConfigError(f"model.{key}={getattr(self, key)}: valid: {', '.join(valid)}")
        for key in ("width", "width_per_group"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}={getattr(self, key)}: must be at least 1")
        if self.block == "basic" and self.width_per_group != 64:
            raise ConfigError(f"model.width_per_group={self.width_per_group}: basic blocks take 64 only")
        stages = {"resnet": 4, "mlp": 1, "mobilenetv3": 0}.get(self.family)
        if stages is None and not self.layers or stages is not None and len(self.layers) != stages:
            wanted = "one or more numbers" if stages is None else f"{stages} numbers"
            raise ConfigError(f"model.layers={self.layers}: {self.family} takes {wanted}")
        if any(count < 1 for count in self.layers):
            raise ConfigError(f"model.layers={self.layers}: every stage needs at least 1")


def build(cfg: Mapping[str, Any], *, num_classes: int, channels: int, size: int) -> nn.Module:
    """Builds the classifier that ``cfg`` describes: images [B, channels, size, size] to logits [B, classes].

    Nothing is downloaded; weights come from torch's global random numbers.

    Raises:
        ConfigError: for a bad key or value.
    """
    spec = VisionSpec.of(cfg)
    model = FAMILIES[spec.family](spec, num_classes=num_classes, channels=channels, size=size)
    if (init := INITS[spec.init]) is not None:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                init(module.weight)
    return model


def _resnet(spec: VisionSpec, *, num_classes: int, channels: int, size: int) -> nn.Module:
    return ResNet(
        spec.block,
        spec.layers,
        width=spec.width,
        width_per_group=spec.width_per_group,
        channels=channels,
        num_classes=num_classes,
        small=size < SMALL,
    )


def _stem(channels: int, width: int, small: bool, like: nn.Conv2d) -> nn.Conv2d:
    """torchvision's first convolution ``like``, for other input channels and, if ``small``, 3x3 stride 1."""
    kernel, stride, padding = (3, 1, 1) if small else (like.kernel_size, like.stride, like.padding)
    conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _densenet(spec: VisionSpec, *, num_classes: int, channels: int, size: int) -> nn.Module:
    model = torchvision.models.DenseNet(
        growth_rate=spec.width,
        block_config=tuple(spec.layers),
        num_init_features=2 * spec.width,
        num_classes=num_classes,
    )
    small = size < SMALL
    model.features.conv0 = _stem(channels, 2 * spec.width, small, model.features.conv0)
    if small:
        model.features.pool0 = nn.Identity()
    return model


def _mobilenetv3(spec: VisionSpec, *, num_classes: int, channels: int, size: int) -> nn.Module:
    model = torchvision.models.mobilenet_v3_large(width_mult=spec.width / 16, num_classes=num_classes)
    first = model.features[0]
    first[0] = _stem(channels, first[0].out_channels, size < SMALL, first[0])
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, (nn.Hardswish, nn.Hardsigmoid)):
                setattr(parent, name, _Hard(swish=isinstance(module, nn.Hardswish)))
    return model


class _Hard(nn.Module):
    """Hard sigmoid min(max(x + 3, 0), 6) / 6, or hard swish, x times it; torch's own have no second derivative."""

    def __init__(self, swish: bool):
        super().__init__()
        self.swish = swish

    def forward(self, x):
        gate = nn.functional.relu6(x + 3) / 6
        return x * gate if self.swish else gate


def _swin(spec: VisionSpec, *, num_classes: int, channels: int, size: int) -> nn.Module:
    small = size < SMALL
    patch, window = (2, 4) if small else (4, 7)
    heads = max(1, spec.width // 32)  # of 32 features each, as published
    if spec.width > 32 and spec.width % 32:
        raise ConfigError(f"model.width={spec.width}: above 32, swin takes multiples of 32")
    if sum(spec.layers) < 2:
        raise ConfigError(f"model.layers={spec.layers}: swin takes two layers or more in all")
    model = torchvision.models.SwinTransformer(
        patch_size=[patch, patch],
        embed_dim=spec.width,
        depths=spec.layers,
        num_heads=[heads * 2**stage for stage in range(len(spec.layers))],
        window_size=[window, window],
        stochastic_depth_prob=0.2,
        num_classes=num_classes,
    )
    model.features[0][0] = nn.Conv2d(channels, spec.width, patch, stride=patch)
    return model


def _mlp(spec: VisionSpec, *, num_classes: int, channels: int, size: int) -> nn.Module:
    """Fully connected network; free of batch statistics, so a step over ranks equals that of one process."""
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = channels * size * size
    for layer in range(spec.layers[0]):
        modules[f"hidden{layer}"] = nn.Linear(features, spec.width)
        modules[f"relu{layer}"] = nn.ReLU(inplace=True)
        features = spec.width
    modules["head"] = nn.Linear(features, num_classes)
    return nn.Sequential(modules)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "resnet": _resnet,
    "densenet": _densenet,
    "mobilenetv3": _mobilenetv3,
    "swin": _swin,
    "mlp": _mlp,
}
