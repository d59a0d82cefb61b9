"""A layer that a step does not use has no gradient: every optimizer leaves it where it is and steps the others."""

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
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


@pytest.mark.parametrize("name", ["adabayes", "adabayes-fp", "msvag"])
def test_a_weight_that_is_first_used_late_begins_as_any_other(name):
    """Averages that begin at 0 are corrected by the steps that the weight itself took."""
    optim, finals = compose([f"optim={name}", "data=digits", "model=mlp", "logger=none"]).optim, []
    for before in (0, 20):
        early, late = nn.Linear(3, 1), nn.Linear(3, 1)
        nn.init.constant_(late.weight, 0.3)
        optimizer = build_optimizer(optim, OmegaConf.create({"name": "none"}), nn.ModuleList([early, late]))
        for step in range(before + 3):
            early.weight.grad = torch.ones(1, 3)
            late.weight.grad = torch.ones(1, 3) / (step - before + 1) if step >= before else None
            optimizer.step()
        finals.append(late.weight.detach().clone())
    torch.testing.assert_close(*finals)


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
