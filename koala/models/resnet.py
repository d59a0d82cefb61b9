"""ResNets from torchvision's blocks, with a stem for small images and a width to choose."""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet, module by module and under the same names, but for what its constructor lacks.

    Args:
        block: "basic" or "bottleneck".
        layers: blocks in each of the four stages.
        width: channels of the first stage, 64 as published; every stage scales with it.
        width_per_group: channels inside a bottleneck for each 64 outside: 128 makes a Wide ResNet-50-2.
        channels: of the input images.
        small: a 3x3 stride-1 stem without max-pool, for images of 32x32 (He et al., arXiv 1512.03385,
            section 4.2), in place of ImageNet's 7x7 stride-2 one.
    """

    def __init__(
        self,
        block: str,
        layers: list[int],
        *,
        width: int,
        width_per_group: int,
        channels: int,
        num_classes: int,
        small: bool,
    ) -> None:
        nn.Module.__init__(self)  # the parent's own would fix the width at 64; its _make_layer and forward are used
        kind = BLOCKS[block]
        self._norm_layer, self.inplanes, self.dilation, self.groups = nn.BatchNorm2d, width, 1, 1
        self.base_width = width_per_group
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(kind, width, layers[0])
        self.layer2 = self._make_layer(kind, 2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(kind, 4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(kind, 8 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width * kind.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
