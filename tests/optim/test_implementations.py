"""Both implementations take the steps of the readable filters; none reads a device value; blocks bound memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import koala

from .cases import IDS, NAMES, VARIANTS, assert_same, batch, closure_for, make, net, reference_snapshot, snapshot, train


def trajectory(name, hyper, fused, dtype=torch.float64, steps=8):
    model = net(dtype)
    optimizer = make(name, model, **hyper, fused=fused)
    train(model, optimizer, steps)
    return snapshot(model, optimizer)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_follows_the_reference(name, hyper, fused):
    truth = reference_snapshot(name, hyper, 8)
    seen = trajectory(name, hyper, fused)
    assert_same({key: seen[key] for key in truth}, truth, rtol=1e-9, atol=1e-11)


def test_a_negative_innovation_variance_is_that_of_the_equations(fused):
    """KOALA++'s covariance of least norm is not always positive: a step as published, and no infinite one."""
    sigma, q, R, lr = 0.1, 1e-6, 0.1, 0.01
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = make("koala++", [weight], sigma=sigma, q=q, r=R, lr=lr, fused=fused)
    x = weight.detach().clone()
    for step, g in enumerate(torch.tensor([[-1.0, 1.0], [1.0, 2.0], [-7.0, 1.0], [2.0, 3.0]], dtype=torch.float64)):
        weight.grad = g.clone()
        optimizer.step(loss=1.0)
        if step == 0:
            h, v, S = g, sigma * g, (sigma + q) * (g @ g) + R
        alpha, gain, w = g @ h / (h @ h), (g @ v + q * (g @ h)) / S, g @ v / (h @ h) - (h @ v) * (g @ h) / (h @ h) ** 2
        v = (alpha - gain) * v + q * (g - gain * h) + w * h
        h, S = g, v @ g + q * (g @ g) + R
        x = x - lr / S * (v + q * g)
        assert (S < 0) == (step == 2)
        torch.testing.assert_close(weight.detach(), x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_follows_the_reference_in_lower_precision(name, dtype, fused):
    hyper = {"weight_decay": 0.05, "lr": 0.05}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.15, "atol": 0.05}
    truth = reference_snapshot(name, hyper, 7)
    seen = trajectory(name, hyper, fused, dtype, steps=7)
    assert_same({key: seen[key].double() for key in truth}, truth, **tolerance)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["koala-v", "koala-m", "koala++"])
def test_the_gain_is_that_of_the_last_update(name, fused):
    """A prediction, an update that is skipped, and a load leave it."""
    model = net()
    optimizer = make(name, model, fused=fused)
    train(model, optimizer, 3)
    gain = optimizer.diagnostics()["gain"].item()
    assert 0 < gain < 1
    optimizer.predict()
    assert optimizer.diagnostics()["gain"].item() == pytest.approx(gain, rel=1e-12)
    optimizer.update(float("nan"))
    assert optimizer.diagnostics()["gain"].item() == pytest.approx(gain, rel=1e-12)
    loaded = make(name, net(), fused=fused)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.diagnostics()["gain"], optimizer.diagnostics()["gain"])


class NoHostReads(TorchDispatchMode):
    """Fails on what ``.item()``, ``float(tensor)``, ``if tensor`` and ``alpha=tensor`` come down to."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_a_step_reads_no_value(name, hyper, fused):
    model = net()
    optimizer = make(name, model, **hyper, fused=fused)
    for step in range(3):
        closure = closure_for(model, optimizer, batch(step))
        optimizer.predict()
        losses = closure()
        with NoHostReads():
            optimizer.update(losses.mean(), losses.square().mean())
            optimizer.predict()


def test_the_mode_catches_host_reads():
    with pytest.raises(AssertionError), NoHostReads():
        torch.ones(2).sum().item()


@pytest.mark.parametrize(("name", "buffers"), [("koala-v", 0), ("koala-m", 2), ("koala++", 2), ("sofim", 1)])
def test_state_per_weight(name, buffers):
    model = torch.nn.Linear(300, 200, bias=False)
    optimizer = make(name, model, lr=1e-3)
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step(loss=1.0)
    sizes = [value.numel() for value in optimizer.state[model.weight].values() if value.dim()]
    assert sum(sizes) == buffers * 300 * 200
    info = next(info for info in koala.list_optimizers() if info.name == name)
    assert info.buffers == buffers


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_the_reference_takes_over_in_the_middle_and_hands_back(name, hyper):
    """One word and a checkpoint: its state is the fast optimizer's."""
    model = net()
    optimizer = make(name, model, **hyper)
    for first, fused in ((0, None), (3, "reference"), (6, None)):
        state = optimizer.state_dict()
        optimizer = make(name, model, fused=fused, **hyper)
        optimizer.load_state_dict(state)
        train(model, optimizer, 3, first=first)
    uninterrupted = net()
    alone = make(name, uninterrupted, **hyper)
    train(uninterrupted, alone, 9)
    assert_same(snapshot(model, optimizer), snapshot(uninterrupted, alone), rtol=1e-9, atol=1e-11)
