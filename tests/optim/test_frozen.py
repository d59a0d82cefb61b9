"""A parameter that requires no gradient is moved by nothing; one that merely has none is predicted as published."""

import pytest
import torch

from .cases import IDS, NAMES, VARIANTS, assert_same, batch, closure_for, make, net, snapshot, train


def frozen_state(model, optimizer):
    return {key: value for key, value in snapshot(model, optimizer).items() if "linear." in key}


@pytest.mark.parametrize("when", ["between steps", "before the update"])
@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_a_frozen_layer_stays_with_its_state(name, hyper, when, fused):
    """Even with a gradient that was left behind; thawed, it goes on from the state that it had."""
    model = net()
    optimizer = make(name, model, **hyper, fused=fused)
    train(model, optimizer, 3)
    if when == "before the update":
        optimizer.predict()
    model.linear.requires_grad_(False)
    before = frozen_state(model, optimizer)
    assert len(before) >= 2 and model.linear.weight.grad is not None
    if when == "before the update":
        optimizer.step(loss=1.0)
    for step in range(3, 6):
        moving = model.conv.weight.clone()
        train(model, optimizer, 1, first=step)
        assert not torch.equal(model.conv.weight, moving)
    assert_same(frozen_state(model, optimizer), before, rtol=0, atol=0)
    model.linear.requires_grad_(True)
    train(model, optimizer, 1, first=6)
    after = frozen_state(model, optimizer)
    assert not torch.equal(after["weights.linear.weight"], before["weights.linear.weight"])


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_freezing_and_thawing_follow_the_reference(name, hyper, fused):
    finals = []
    for implementation in (fused, "reference"):
        model = net()
        optimizer = make(name, model, **hyper, fused=implementation)
        for step in range(9):
            model.linear.requires_grad_(step not in (3, 4, 5))
            model.conv.bias.requires_grad_(step > 1)
            train(model, optimizer, 1, first=step)
        finals.append(snapshot(model, optimizer))
    assert_same(*finals, rtol=1e-9, atol=1e-11)


def test_a_weight_without_a_gradient_is_predicted(fused):
    """Its velocity decays by the factor a each step."""
    model = net()
    optimizer = make("koala-m", model, a=0.5, fused=fused)
    train(model, optimizer, 3)
    before, velocity = model.conv.weight.detach().clone(), optimizer.state[model.conv.weight]["velocity"].clone()
    for step in (3, 4):
        optimizer.predict()
        closure_for(model, optimizer, batch(step))()
        model.conv.weight.grad = None
        optimizer.update(1.0)
    torch.testing.assert_close(model.conv.weight.detach(), before + 1.5 * velocity, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_layer_may_be_cast(name, fused):
    model = net(torch.float32)
    optimizer = make(name, model, lr=0.1, fused=fused)
    train(model, optimizer, 2)
    model.linear.requires_grad_(False).double()
    model.conv.double()
    model.double()
    optimizer.zero_grad()
    train(model, optimizer, 2, first=2)
    model.linear.requires_grad_(True)
    train(model, optimizer, 2, first=4)
    assert all(p.isfinite().all() and p.dtype == torch.float64 for p in model.parameters())
