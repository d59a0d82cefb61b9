"""What is refused, and that the message names it."""

import pytest
import torch
from torch import nn

import koala

from .cases import NAMES, batch, closure_for, make, net, snapshot

NEEDS_LOSS = [info.name for info in koala.list_optimizers() if info.needs_loss]


@pytest.mark.parametrize("name", NEEDS_LOSS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.step(), "was given no loss"),
        (lambda o: o.update(), "was given no loss"),
        (lambda o: o.step(lambda: None), "was given no loss"),
        (lambda o: o.step(lambda: 1.0, loss=1.0), "not both"),
        (lambda o: o.update(None, 1.0), "was given no loss"),
        (lambda o: o.update(torch.ones(2), 1.0), r"loss must be a scalar, got shape \(2,\)"),
        (lambda o: o.update(1.0, torch.ones(3)), r"loss_var must be a scalar, got shape \(3,\)"),
        (lambda o: o.step(loss=torch.ones(2, 2)), "loss must be a scalar"),
    ],
)
def test_wrong_losses_are_refused(name, call, message):
    model = net()
    optimizer = make(name, model)
    closure_for(model, optimizer, batch(0))()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        call(optimizer)
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model, optimizer).items() if key in before
               and key.startswith("weights"))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_wrong_hyper_parameters_are_refused(name):
    defaults = make(name, net()).defaults
    for key, value in defaults.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("sc", "lower_bound"):
            with pytest.raises(ValueError, match=f"{key} must not be negative, got -0.5"):
                make(name, net(), **{key: -0.5})
            with pytest.raises(ValueError, match=f"{key} must not be negative"):
                make(name, net(), **{key: float("nan")})
    with pytest.raises(TypeError, match=r"no argument 'momentun'.*weight_decay"):
        make(name, net(), momentun=0.9)
    with pytest.raises(ValueError, match="lr as a tensor must have one element"):
        make(name, net(), lr=torch.ones(2))
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        koala.create_optimizer(name, [{"params": net().parameters(), "weight_decay": -1.0}])
    key = {"sofim": "beta", "sgdf": "eps"}.get(name, "alpha_r")
    with pytest.raises(ValueError, match=f"{key} belongs to the whole filter"):
        koala.create_optimizer(name, [{"params": net().parameters(), key: 0.5}])
    with pytest.raises(ValueError, match="not of a"):
        sgd = torch.optim.SGD(net().parameters(), lr=0.1)
        make(name, net()).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize(("key", "value"), [("beta", 1.0), ("rho", 0.0)])
def test_what_makes_sofim_divide_by_zero_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        koala.SOFIM(net().parameters(), **{key: value})


def test_covariance_that_is_none_is_refused():
    with pytest.raises(ValueError, match="sc"):
        koala.MomentumKOALA(net().parameters(), sw=0.1, sc=0.2, sv=0.1)
    with pytest.raises(ValueError, match="target"):
        koala.MomentumKOALA(net().parameters(), target=0.0)
    koala.MomentumKOALA(net().parameters(), sc=-0.05)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_and_complex_are_refused(name):
    with pytest.raises(ValueError, match="complex"):
        koala.create_optimizer(name, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = koala.create_optimizer(name, embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(loss=1.0)
