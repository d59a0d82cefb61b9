"""Image classifiers from torchvision's parts, for images of 32x32 and less as well as ImageNet's.

Images below 64x64 get a small-image stem: the network's first layer keeps the resolution (or, for Swin, cuts
patches of 2x2 instead of 4x4). ``width`` is each family's own measure and scales the whole network.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from koala.errors import ConfigError
from koala.models.hard import differentiable_twice
from koala.schema import Schema, Word

SMALL = 64  # images of fewer pixels a side get the small-image stem

# The initialisations of KOALA's Table 5; "default" is the family's own (for ResNets Kaiming normal with fan-out) and
# "torch" that of torch's layers, for networks whose authors left it so.
INITS: dict[str, Callable[..., Any] | None] = {
    "default": None,
    "xavier-normal": nn.init.xavier_normal_,
    "xavier-uniform": nn.init.xavier_uniform_,
    "kaiming-normal": partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "kaiming-uniform": partial(nn.init.kaiming_uniform_, mode="fan_out", nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
}

Width = Annotated[int, Field(ge=1)]
Stages = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class VisionSpec(Schema):
    """The keys that every image model has; each family adds its own and says how it is built."""

    name: Word
    kind: Literal["vision"]
    family: str
    width: Width
    init: Literal["default", "torch", "xavier-normal", "xavier-uniform", "kaiming-normal", "kaiming-uniform",
                  "orthogonal"] = "default"  # fmt: skip

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """Builds the network for images of ``channels`` x ``size`` x ``size``."""
        raise NotImplementedError

    def build(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """Builds and initialises the network; weights come from torch's global random numbers."""
        model = self.network(num_classes, channels, size)
        for module in model.modules():
            if self.init == "torch" and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif (init := INITS.get(self.init)) is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
                init(module.weight)
        return model


class ResNetSpec(VisionSpec):
    """He et al., arXiv 1512.03385; Zagoruyko and Komodakis, 1605.07146. ``width``: channels of the first stage."""

    block: Literal["basic", "bottleneck"] = "basic"
    layers: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
    width_per_group: Width = 64  # 128 for a Wide ResNet-50-2

    @model_validator(mode="after")
    def _basic_blocks_have_one_width(self) -> "ResNetSpec":
        if self.block == "basic" and self.width_per_group != 64:
            raise ConfigError("width_per_group", self.width_per_group, "basic blocks have one width", valid="64")
        return self

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """See koala.models.resnet."""
        from koala.models.resnet import ResNet

        return ResNet(
            self.block,
            self.layers,
            width=self.width,
            width_per_group=self.width_per_group,
            channels=channels,
            num_classes=num_classes,
            small=size < SMALL,
        )


def stem(channels: int, width: int, small: bool, like: nn.Conv2d) -> nn.Conv2d:
    """torchvision's first convolution ``like``, for other input channels and, if ``small``, 3x3 stride 1."""
    kernel, stride, padding = (3, 1, 1) if small else (like.kernel_size, like.stride, like.padding)
    conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class DenseNetSpec(VisionSpec):
    """``width``: growth rate. Huang et al., arXiv 1608.06993."""

    layers: Stages
    stem_features: Width | None = None  # null: twice the growth rate
    # Of the small-image stem. SGDF's and KOALA++'s released DenseNets have the convolution alone.
    stem_norm: bool = True

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """torchvision's, but for the stem."""
        features = self.stem_features or 2 * self.width
        import torchvision  # here: takes as long as torch

        model = torchvision.models.DenseNet(self.width, tuple(self.layers), features, num_classes=num_classes)
        small = size < SMALL
        model.features.conv0 = stem(channels, features, small, model.features.conv0)
        if small:
            model.features.pool0 = nn.Identity()
            if not self.stem_norm:
                model.features.norm0 = model.features.relu0 = nn.Identity()
        return model


class MobileNetV3Spec(VisionSpec):
    """Howard et al., arXiv 1905.02244. ``width``: channels of the stem, with which all scale, to multiples of 8."""

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """torchvision's MobileNetV3-Large, with activations that have second derivatives."""
        import torchvision  # here: takes as long as torch

        model = torchvision.models.mobilenet_v3_large(width_mult=self.width / 16, num_classes=num_classes)
        first = model.features[0]
        first[0] = stem(channels, first[0].out_channels, size < SMALL, first[0])
        return differentiable_twice(model)


class SwinSpec(VisionSpec):
    """``width``: features of the first stage, 32 for each attention head. Liu et al., arXiv 2103.14030."""

    layers: Stages

    @model_validator(mode="after")
    def _fits_its_heads(self) -> "SwinSpec":
        if self.width > 32 and self.width % 32:
            raise ConfigError(
                "width", self.width, "swin has heads of 32 features", valid="up to 32, or a multiple of 32"
            )
        if sum(self.layers) < 2:
            raise ConfigError("layers", self.layers, "swin takes two layers or more in all")
        return self

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """torchvision's, with patches of 2x2 and windows of 4x4 on small images."""
        patch, window = (2, 4) if size < SMALL else (4, 7)
        heads = max(1, self.width // 32)
        import torchvision  # here: takes as long as torch

        model = torchvision.models.SwinTransformer(
            patch_size=[patch, patch],
            embed_dim=self.width,
            depths=self.layers,
            num_heads=[heads * 2**stage for stage in range(len(self.layers))],
            window_size=[window, window],
            stochastic_depth_prob=0.2,
            num_classes=num_classes,
        )
        model.features[0][0] = nn.Conv2d(channels, self.width, patch, stride=patch)
        return model


class VGGSpec(VisionSpec):
    """``width``: channels of the first layer, 64 as published. Simonyan and Zisserman, arXiv 1409.1556.

    ``head``: ``imagenet`` is torchvision's, 4096-4096-classes over 7x7 positions. The other two are SGDF's for CIFAR,
    512-512-classes with dropout 0.5: before the first two linear layers, or after their ReLUs with linear weights from
    N(0, 0.01^2).
    """

    depth: Literal["11", "13", "16", "19"]
    norm: bool
    head: Literal["imagenet", "sgdf-cifar10", "sgdf-cifar100"]

    LAYERS: ClassVar = {  # convolutions of each stage
        "11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4),
    }  # fmt: skip

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """Five stages of 3x3 convolutions and 2x2 pooling, and the head."""
        features = nn.Sequential()
        for stage, count in enumerate(self.LAYERS[self.depth]):
            width = self.width * min(2**stage, 8)
            for _ in range(count):
                features.append(nn.Conv2d(channels, width, 3, padding=1))
                if self.norm:
                    features.append(nn.BatchNorm2d(width))
                features.append(nn.ReLU(inplace=True))
                channels = width
            features.append(nn.MaxPool2d(2, ceil_mode=True))  # ceil_mode: images below 32x32 keep a pixel
        if self.head == "imagenet":
            model = nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), self._imagenet_head(num_classes))
            for module in features:
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                    nn.init.zeros_(module.bias)
            return model
        side = max(1, size // 32)
        return nn.Sequential(features, nn.Flatten(), self._cifar_head(8 * self.width * side**2, num_classes))

    def _imagenet_head(self, num_classes: int) -> nn.Sequential:
        """torchvision's head."""
        sizes = (8 * self.width * 49, 64 * self.width, 64 * self.width, num_classes)
        head = nn.Sequential()
        for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            linear = nn.Linear(inputs, outputs)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            head.extend([linear, nn.ReLU(inplace=True), nn.Dropout(0.5)] if layer < 2 else [linear])
        return head

    def _cifar_head(self, features: int, num_classes: int) -> nn.Sequential:
        """SGDF's two heads for CIFAR, which differ in dropout and initialisation."""
        width = 8 * self.width
        first, second, last = nn.Linear(features, width), nn.Linear(width, width), nn.Linear(width, num_classes)
        if self.head == "sgdf-cifar10":
            return nn.Sequential(nn.Dropout(), first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), last)
        for linear in (first, second, last):
            nn.init.normal_(linear.weight, std=0.01)
        return nn.Sequential(first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout(), last)


class MLPSpec(VisionSpec):
    """Fully connected network; free of batch statistics, so a step over ranks equals that of one process."""

    layers: Annotated[list[Width], Field(min_length=1, max_length=1)]  # the number of hidden layers

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """Hidden layers of ``width`` with ReLU, and the head."""
        modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        features = channels * size * size
        for layer in range(self.layers[0]):
            modules[f"hidden{layer}"] = nn.Linear(features, self.width)
            modules[f"relu{layer}"] = nn.ReLU(inplace=True)
            features = self.width
        modules["head"] = nn.Linear(features, num_classes)
        return nn.Sequential(modules)
