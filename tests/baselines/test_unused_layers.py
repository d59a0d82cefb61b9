"""A layer that a step does not use has no gradient: every optimizer leaves it where it is and steps the others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koala.runs import compose
from koala.runs.schema import options
from koala.training.optimizers import build_optimizer, needs_of


class Net(nn.Module):
    """A layer in use, one never used, and one used in some of the steps."""

    def __init__(self):
        super().__init__()
        self.used, self.never, self.sometimes = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    every = False  # whether `sometimes` is used

    def forward(self, images):
        hidden = self.used(images.flatten(1)).relu()
        return self.head(self.sometimes(hidden).relu() if self.every else hidden)


@pytest.mark.parametrize("name", options("optim"))
def test_layers_without_a_gradient_stay_where_they_are(name):
    cfg = compose([f"optim={name}", "data=digits", "model=mlp", "logger=none"])
    if needs_of(cfg.optim).outputs:
        pytest.skip("differentiates the outputs itself")
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(cfg.optim, cfg.wrapper, net)
    if callable(getattr(optimizer, "train", None)):  # schedule-free
        optimizer.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images, targets = torch.randn(8, 1, 2, 2), torch.randint(3, (8,))
    for step in range(4):
        net.every = step >= 2

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), targets)
            loss.backward(create_graph=needs_of(cfg.optim).create_graph)
            return loss

        optimizer.step(closure)
        after = net.state_dict()
        assert all(value.isfinite().all() for value in after.values())
        assert torch.equal(after["never.weight"], before["never.weight"])
        if step < 2:
            assert torch.equal(after["sometimes.weight"], before["sometimes.weight"])
    for layer in ("used", "sometimes", "head"):
        assert not torch.equal(after[f"{layer}.weight"], before[f"{layer}.weight"]), layer
