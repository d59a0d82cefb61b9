"""Two networks of KOALA++'s image table as their authors released them: not quite those that they are named after.

Written from the description in the paper's released repository; weights for 10 classes: Tiny Swin 26,598,166,
MobileNetV3 70,045,738.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf

from koala.errors import ConfigError
from koala.models.hard import Hard, differentiable_twice
from koala.models.vision import SMALL, VisionSpec, stem

WINDOW = 2  # side of Tiny Swin's windows


class MobileNetV3ReleasedSpec(VisionSpec):
    """MobileNetV3-Large whose "depthwise" convolutions have no groups: full k x k ones, 17 times the weights.

    Stem and second block have stride 1 (maps of 32, 32, 16, 8, 4), squeeze and excitation plain linear layers without
    bias, the head a 1x1 convolution without bias or norm. Convolutions start Kaiming normal (fan-out), linear layers
    from N(0, 0.001^2) (their bias at 0: assumed). ``width``: channels of the stem, 16 as released.
    """

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """torchvision's blocks, with other parts put in."""
        settings, last = _mobilenet_v3_conf("mobilenet_v3_large", width_mult=self.width / 16)
        settings[1].stride = 1
        model = MobileNetV3(settings, last, num_classes, norm_layer=nn.BatchNorm2d)
        first = model.features[0]
        first[0] = stem(channels, first[0].out_channels, size < SMALL, first[0])
        for block in model.features[1:-1]:
            for part in block.block:
                if isinstance(part, nn.Sequential) and part[0].groups > 1:
                    thin = part[0]
                    sizes = thin.in_channels, thin.out_channels, thin.kernel_size, thin.stride, thin.padding
                    part[0] = nn.Conv2d(*sizes, bias=False)
            for name, part in list(block.block.named_children()):
                if not isinstance(part, nn.Sequential):
                    setattr(block.block, name, _SqueezeExcitation(part.fc1.in_channels))
        features = model.classifier[0].in_features
        model.classifier = nn.Sequential(
            nn.Unflatten(1, (features, 1, 1)),
            nn.Conv2d(features, last, 1, bias=False),
            nn.Hardswish(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(last, num_classes),
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return differentiable_twice(model)


class _SqueezeExcitation(nn.Module):
    """Scales channels by what two linear layers make of their means; reduction 4."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(channels, channels // 4, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 4, channels, bias=False),
            Hard(swish=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class SwinReleasedSpec(VisionSpec):
    """Tiny Swin with windows of 2x2 on maps of 16, 8, 4 and 4. ``width``: features of the first stage, 96 as released.

    ``layers``: blocks of each stage; every second one attends in windows shifted by 1. Heads have 32 features.
    """

    layers: list[Annotated[int, Field(ge=1)]] = [2, 2, 6, 2]
    merging: list[Annotated[int, Field(ge=1)]] = [2, 2, 2, 1]  # side of the patches that a stage makes one of

    @model_validator(mode="after")
    def _a_patch_for_each_stage(self) -> "SwinReleasedSpec":
        if len(self.layers) != len(self.merging):
            raise ConfigError("merging", self.merging, f"needs {len(self.layers)} values, one for each stage of layers")
        if self.width > 32 and self.width % 32:
            raise ConfigError(
                "width", self.width, "swin has heads of 32 features", valid="up to 32, or a multiple of 32"
            )
        return self

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """Stages of merging and blocks, then mean over positions, LayerNorm and a linear layer."""
        modules, width = [_ChannelsLast()], self.width
        for count, side in zip(self.layers, self.merging, strict=True):
            modules.append(_Merging(channels, width, side))
            size = -(-size // side)
            modules += [_Block(width, min(WINDOW, size), shift=block % 2) for block in range(count)]
            channels, width = width, 2 * width
        return nn.Sequential(*modules, _MeanOverPositions(), nn.LayerNorm(channels), nn.Linear(channels, num_classes))


class _ChannelsLast(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1)


class _MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


class _Merging(nn.Module):
    """Makes each patch of a map [B, H, W, C], padded if need be, one position of [B, H / side, W / side, width]."""

    def __init__(self, channels: int, width: int, side: int):
        super().__init__()
        self.side, self.linear = side, nn.Linear(channels * side**2, width)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
        return self.linear(_windows(x, side).flatten(3))


class _Block(nn.Module):
    """Attention in windows, then a perceptron, each after a LayerNorm and added to what came in."""

    def __init__(self, width: int, window: int, shift: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _WindowAttention(width, window, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _windows(x: Tensor, side: int) -> Tensor:
    """[B, H, W, C] to [B, H / side, W / side, side^2, C]."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4)


class _WindowAttention(nn.Module):
    """Attention of each window's positions to each other, with one table of relative positions for all heads.

    A shifted block moves the map by ``shift`` first, so that its windows lie across those of the block before; what was
    moved around the edge does not see what it came to lie beside.
    """

    def __init__(self, width: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = max(1, width // 32), window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.positions = nn.Parameter(torch.randn(2 * WINDOW - 1, 2 * WINDOW - 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        shifted = self.shift and height > self.window
        if shifted:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        inputs = _windows(x, self.window)  # [B, rows, columns, positions, C]
        query, key, value = self.qkv(inputs).unflatten(-1, (3, self.heads, -1)).movedim(-2, 3).unbind(-2)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + self._bias(x.device)
        if shifted:
            scores = scores.masked_fill(self._strangers(height, width, x.device), -torch.inf)
        seen = scores.softmax(-1) @ value  # [B, rows, columns, heads, positions, features]
        merged = self.out(seen.transpose(3, 4).flatten(4))
        rows, columns = merged.shape[1:3]
        merged = merged.unflatten(3, (self.window, self.window)).transpose(2, 3)
        merged = merged.reshape(-1, rows * self.window, columns * self.window, merged.shape[-1])
        return merged.roll((self.shift, self.shift), (1, 2)) if shifted else merged

    def _bias(self, device: torch.device) -> Tensor:
        """The table's entry for each pair of positions, [positions, positions]."""
        side = torch.arange(self.window, device=device)
        position = torch.cartesian_prod(side, side)
        apart = position[None] - position[:, None] + WINDOW - 1
        return self.positions[apart[..., 0], apart[..., 1]]

    def _strangers(self, height: int, width: int, device: torch.device) -> Tensor:
        """Pairs of a window that were not neighbours before the shift, [rows, columns, 1, positions, positions]."""
        regions = [torch.arange(length, device=device) >= length - self.shift for length in (height, width)]
        region = 2 * regions[0][:, None] + regions[1]
        region = _windows(region[None, :, :, None], self.window)[0, ..., 0]
        return (region[..., None] != region[..., None, :])[:, :, None]
