"""What is refused, and that the message names the argument."""

import pytest
import torch
from torch import nn

import koala
from tests.refused import rejected

from .cases import NAMES, batch, closure_for, make, net, snapshot

NEEDS_LOSS = [info.name for info in koala.list_optimizers() if info.needs_loss]


@pytest.mark.parametrize("name", NEEDS_LOSS)
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda o: o.step(), ["loss"]),
        (lambda o: o.update(), ["loss"]),
        (lambda o: o.step(lambda: None), ["loss"]),
        (lambda o: o.step(lambda: 1.0, loss=1.0), ["closure", "loss"]),
        (lambda o: o.update(None, 1.0), ["loss"]),
        (lambda o: o.update(torch.ones(2), 1.0), ["loss", "(2,)"]),
        (lambda o: o.update(1.0, torch.ones(3)), ["loss_var", "(3,)"]),
        (lambda o: o.step(loss=torch.ones(2, 2)), ["loss", "(2, 2)"]),
    ],
)
def test_wrong_losses_are_refused(name, call, names):
    model = net()
    optimizer = make(name, model)
    closure_for(model, optimizer, batch(0))()
    before = snapshot(model, optimizer)
    with rejected(ValueError, *names):
        call(optimizer)
    after = snapshot(model, optimizer)
    assert all(torch.equal(after[key], value) for key, value in before.items() if key.startswith("weights"))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_hyper_parameters_are_refused(name):
    defaults = make(name, net()).defaults
    for key, value in defaults.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("sc", "lower_bound"):
            for wrong in (-0.5, float("nan")):
                with rejected(ValueError, key, wrong):
                    make(name, net(), **{key: wrong})
    with rejected(TypeError, "momentun", "weight_decay"):
        make(name, net(), momentun=0.9)
    with rejected(ValueError, "lr"):
        make(name, net(), lr=torch.ones(2))
    p = nn.Parameter(torch.ones(1))
    for wrong in (p, [], [{"params": [p]}, {"params": [p]}]):  # which torch's own optimizers refuse
        with pytest.raises((TypeError, ValueError)):
            koala.create_optimizer(name, wrong)
    with rejected(ValueError, "weight_decay", -1.0):
        koala.create_optimizer(name, [{"params": net().parameters(), "weight_decay": -1.0}])
    key = {"sofim": "beta", "sgdf": "eps"}.get(name, "alpha_r")
    with rejected(ValueError, key):
        koala.create_optimizer(name, [{"params": net().parameters(), key: 0.5}])
    sgd = torch.optim.SGD(net().parameters(), lr=0.1)
    with rejected(ValueError, type(make(name, net())).__name__):
        make(name, net()).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize(("key", "value"), [("beta", 1.0), ("rho", 0.0)])
def test_what_makes_sofim_divide_by_zero_is_refused(key, value):
    with rejected(ValueError, key):
        koala.SOFIM(net().parameters(), **{key: value})


def test_covariance_that_is_none_is_refused():
    with rejected(ValueError, "sc=0.2"):
        koala.MomentumKOALA(net().parameters(), sw=0.1, sc=0.2, sv=0.1)
    with rejected(ValueError, "target"):
        koala.MomentumKOALA(net().parameters(), target=0.0)
    koala.MomentumKOALA(net().parameters(), sc=-0.05)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_and_complex_are_refused(name):
    with rejected(ValueError, "complex"):
        koala.create_optimizer(name, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = koala.create_optimizer(name, embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with rejected(RuntimeError, "sparse"):
        optimizer.step(loss=1.0)
