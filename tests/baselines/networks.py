"""One small network with every kind of layer that a baseline treats in its own way, and its data."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """conv (bias, stride) - norm - conv (groups) - norm of tokens - linear - linear, and a tensor of no layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.tokens = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, images):
        hidden = F.relu(self.norm(self.conv(images)), inplace=True)
        hidden = self.tokens(self.grouped(hidden).flatten(2).transpose(1, 2))
        return self.head(F.relu(self.hidden(hidden)).mean(1) * self.scale)


def make(seed: int = 0, dtype=torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(seed: int, count: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(3, (count,), generator=generator)


def closure_for(model, optimizer, images, targets, create_graph=False):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward(create_graph=create_graph)
        return loss

    return closure
