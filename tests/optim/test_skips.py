"""Losses and gradients that are not finite are skipped and counted, without reading a value on the host."""

import pytest
import torch
from torch import nn

import koala

from .cases import NAMES, assert_same, batch, closure_for, make, net, snapshot, train

NEEDS_LOSS = [info.name for info in koala.list_optimizers() if info.needs_loss]
inf, nan = float("inf"), float("nan")


def bits(tensors):
    """Every tensor's bits, so that -0 and 0, and one NaN and another, differ."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {key: value.contiguous().view(sizes[value.element_size()]) for key, value in tensors.items()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    left, right = bits(left), bits(right)
    assert {key for key in left if not torch.equal(left[key], right[key])} == set()


def after_a_bad_gradient(name, fused, value, dtype):
    """State after three steps and one in which conv.weight has `value` for a gradient (or part of one); its skips."""
    model = net(dtype)
    optimizer = make(name, model, weight_decay=0.02, lr=0.1, fused=fused)
    train(model, optimizer, 3)
    optimizer.predict()
    closure_for(model, optimizer, batch(3, dtype=dtype))()
    if value is None:
        model.conv.weight.grad = None
    else:
        model.conv.weight.grad[0, 0, 0, 0] = value
    optimizer.update(1.5, 2.5)
    state = snapshot(model, optimizer)
    return state, state.pop("filter.skipped").item()


@pytest.mark.parametrize("name", ["koala-v", "koala-m"])
def test_the_covariance_stays_where_every_tensor_is_skipped(name, fused):
    """Without measurement noise, too, where the share of the noise is 0 / 0."""
    model, states = net(), {}
    for r in (0.0, 1.0):
        optimizer = make(name, model, r=r, fused=fused)
        optimizer.update(1.0)
        states[r] = {key: value.item() for key, value in optimizer.diagnostics().items() if key != "R"}
    assert states[0.0] == states[1.0] and states[0.0].get("s", states[0.0].get("P11")) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_is_like_a_missing_one(name, value, dtype, fused):
    seen, skipped = after_a_bad_gradient(name, fused, value, dtype)
    truth, none_skipped = after_a_bad_gradient(name, fused, None, dtype)
    assert_same_bits(seen, truth)
    assert (skipped, none_skipped) == (1, 0)


@pytest.mark.parametrize("loss", [(nan, 1.0), (1.0, inf), (-inf, nan), (1e200, 1e308)], ids=str)
@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_a_loss_that_is_not_finite_skips_the_update(name, loss, fused):
    """All bits stay, and stay through the next prediction; then training goes on as if nothing had been."""
    if loss == (1e200, 1e308):  # each a number, but R = (1e200)^2 is none
        hyper = {"measurement": "squared_mean"}
    else:
        hyper = {}
    model = net()
    optimizer = make(name, model, weight_decay=0.02, fused=fused, **hyper)
    train(model, optimizer, 3)
    optimizer.predict()
    closure_for(model, optimizer, batch(3))()
    before = snapshot(model, optimizer)
    optimizer.update(*loss)
    optimizer.predict()
    after = snapshot(model, optimizer)
    assert before.pop("filter.skipped") == 0 and after.pop("filter.skipped") == 1
    assert_same_bits(after, before)
    train(model, optimizer, 2, first=3)

    undisturbed = net()
    other = make(name, undisturbed, weight_decay=0.02, fused=fused, **hyper)
    train(undisturbed, other, 5)
    seen, truth = snapshot(model, optimizer), snapshot(undisturbed, other)
    del seen["filter.skipped"], truth["filter.skipped"]
    assert_same_bits(seen, truth)


HOSTILE = [0.0, -0.0, 1e-45, 1e-30, 1e-10, 1e-5, 1.0, 1e15, 1e30, 3e38, inf, -inf, nan]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_implementations_survive_hostile_gradients_alike(name, dtype):
    """Gradients from nothing to the largest number and beyond, in turns: finite weights, and the same in both."""
    finals = []
    for fused in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5).to(dtype)), nn.Parameter(torch.randn(3, 2).to(dtype))]
        optimizer = make(name, params, lr=0.1, weight_decay=1e-3, fused=fused)
        draws = torch.Generator().manual_seed(1)
        for _ in range(120):
            optimizer.predict()
            for p in params:
                p.grad = torch.randn(p.shape, generator=draws).to(dtype)
                p.grad *= HOSTILE[torch.randint(len(HOSTILE), (), generator=draws)]
            optimizer.update(2.0, 4.0)
        state = {f"{i}": p.detach() for i, p in enumerate(params)} | optimizer.diagnostics()
        assert all(value.isfinite().all() for value in state.values()), state
        finals.append({key: value.double() for key, value in state.items()})
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    assert finals[0].pop("skipped") == finals[1].pop("skipped") > 0
    assert_same(*finals, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_weight_poisons_no_other(name, fused):
    params = [nn.Parameter(torch.tensor([inf, 1.0])), nn.Parameter(torch.ones(3))]
    optimizer = make(name, params, lr=0.1, weight_decay=0.1, fused=fused)
    for _ in range(3):
        optimizer.predict()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.update(1.0, 1.0)
    assert params[1].isfinite().all() and (params[1] < 1).all()
    assert params[0].tolist() == [inf, 1.0]
