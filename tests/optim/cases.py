"""What the optimizer tests run over: every optimizer with a set of valid inputs, and a small problem to step on."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import koala
from koala.optim import reference

# Those that observe outputs have another face: OUTPUTS
CLASSES = {info.name: info.cls for info in koala.list_optimizers() if info.observes != "outputs"}
NAMES = list(CLASSES)
# Every named choice of every optimizer, at rates at which float64 trajectories stay tame.
VARIANTS = [
    ("koala-v", {}),
    ("koala-v", {"weight_decay": 0.05}),
    ("koala-v", {"weight_decay": 0.05, "direction": "l2", "r": 2.0, "q": 0.3}),
    ("koala-m", {}),
    ("koala-m", {"weight_decay": 0.05, "sc": 0.05, "lr": 0.5}),
    ("koala-m", {"adaptive_q": False, "r": 1.5, "a": 0.5}),
    ("koala-m", {"target": 0.5, "measurement": "squared_mean"}),
    ("koala-m", {"lower_bound": 0.7, "weight_decay": 0.02}),
    ("koala++", {"sigma": 0.1, "q": 0.1}),
    ("koala++", {"sigma": 0.2, "q": 0.1, "weight_decay": 0.05}),
    ("koala++", {"sigma": 0.1, "q": 0.1, "is_symmetric": False, "measurement": "variance"}),
    ("koala++", {"sigma": 0.1, "q": 0.1, "measurement": "variance_of_mean", "lower_bound": -1.0}),
    ("sofim", {}),
    ("sofim", {"weight_decay": 0.05, "rho": 1.0}),
    ("sofim", {"weight_decay": 0.05, "precondition": "gradient", "lr": 0.01}),
    ("sgdf", {}),
    ("sgdf", {"weight_decay": 0.05, "eps_reading": "released", "eps": 1e-3, "gamma": 0.25}),
    ("sgdf", {"weight_decay": 0.05, "weight_decouple": True, "gamma": 1.0, "lr": 0.1}),
]
OUTPUTS = [
    ("diagonal-ekf", {}),
    ("diagonal-ekf", {"r": None, "noise": "innovation", "beta": 0.9, "q": 0.01}),
    ("lkf", {"likelihood": "categorical", "block_size": 5}),
]
IDS, OUTPUT_IDS = (
    [f"{name}-{'-'.join(map(str, hyper)) or 'default'}" for name, hyper in cases] for cases in (VARIANTS, OUTPUTS)
)


class Net(nn.Module):
    """A convolution, a 0-dim scale, and an empty, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.linear = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images):
        hidden = torch.tanh(self.conv(images)).flatten(1)
        return self.linear(hidden) * self.scale + self.frozen.sum() + self.empty.sum()


def net(dtype=torch.float64, seed=0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(step: int, size: int = 8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(3, (size,), generator=generator)


def closure_for(model, optimizer, data):
    """Per-sample losses of the model on ``data``, with gradients of their mean; or its outputs and the targets."""
    images, targets = data

    def closure():
        if getattr(optimizer, "observes", None) == "outputs":
            return model(images), targets
        optimizer.zero_grad()
        losses = F.cross_entropy(model(images), targets, reduction="none")
        losses.mean().backward()
        return losses

    return closure


def make(name, subject, fused=None, **hyper):
    """An optimizer of a model, or of parameters or groups; by fused="reference" the readable one."""
    params = subject.parameters() if isinstance(subject, nn.Module) else subject
    if fused == "reference":
        return getattr(reference, CLASSES[name].__name__)(params, **hyper)
    return koala.create_optimizer(name, params, **({"fused": fused} if name in CLASSES else {}), **hyper)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        dtype = next(model.parameters()).dtype
        optimizer.step(closure_for(model, optimizer, batch(step, dtype=dtype)))


def reference_snapshot(name, hyper, steps):
    """Weights and state after some steps of the readable filter."""
    model = net()
    optimizer = make(name, model, **hyper, fused="reference")
    train(model, optimizer, steps)
    return snapshot(model, optimizer)


def snapshot(model, optimizer):
    """Weights, per-parameter state and filter state, as copies in a fixed order."""
    tensors = {f"weights.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = value.clone()
    for key, value in optimizer.diagnostics().items():
        tensors[f"filter.{key}"] = value.clone()
    return copy.copy(tensors)


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance)
