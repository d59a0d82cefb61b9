"""Whose step a kernel makes: that of the class that declares it, and of subclasses that change no part of the step."""

import pytest
import torch
from torch import nn

import koala
from koala.optim import backends

from .cases import CLASSES, NAMES, make, net, train


def subclass(cls, **parts):
    return type(cls.__name__, (cls,), parts)  # of the same name, which decides nothing


def weights_after(cls, **hyper):
    model = net()
    optimizer = cls(model.parameters(), lr=0.1, **hyper)
    train(model, optimizer, 3)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer.backend


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_that_changes_nothing_keeps_the_fast_step(name):
    class Renamed(CLASSES[name]):
        """Nothing."""

        note = "an attribute of its own"

    assert backends.kernel_of(make(name, net())) == backends.kernel_of(Renamed(net().parameters())) is not None
    assert weights_after(Renamed)[1] == weights_after(CLASSES[name])[1] == "cpp"


@pytest.mark.parametrize("name", NAMES)
def test_gains_of_its_own_are_asked(name):
    """Nothing moves where they close every gate: not by the class's own kernel."""

    def gains(self, rows, lr, decay, scalars, state, sums):
        coefficients, scalars, state = CLASSES[name].gains(self, rows, lr, decay, scalars, state, sums)
        return torch.zeros_like(coefficients), scalars, state

    closed, backend = weights_after(subclass(CLASSES[name], gains=gains))
    assert backend == "portable"
    assert torch.equal(closed, torch.cat([p.detach().flatten() for p in net().parameters()]))
    with pytest.raises(RuntimeError):
        weights_after(subclass(CLASSES[name], gains=gains), fused=True)


@pytest.mark.parametrize("part", backends.STEP)
@pytest.mark.parametrize("name", NAMES)
def test_no_part_of_the_step_may_be_another(name, part):
    """On the class, on an instance, or by a mixin."""
    other = ("another",)  # iterable: every load reads the `filter_state` of all classes
    assert backends.kernel_of(make(name, net())) is not None
    changed = subclass(CLASSES[name], **{part: other})
    for cls in (changed, subclass(changed), type("Mixed", (type("Mixin", (), {part: other}), CLASSES[name]), {})):
        assert backends.kernel_of(object.__new__(cls)) is None
    optimizer = make(name, net())
    vars(optimizer)[part] = other
    assert backends.kernel_of(optimizer) is None


def test_gains_that_are_patched_are_asked(monkeypatch):
    monkeypatch.setattr(koala.VanillaKOALA, "gains", lambda *args: pytest.fail("called"))
    with pytest.raises(pytest.fail.Exception):
        weights_after(koala.VanillaKOALA)


def test_a_prediction_of_its_own_is_asked():
    class Still(koala.MomentumKOALA):
        def _predict(self, go):
            pass

    model = net()
    optimizer = Still(model.parameters(), fused=None)
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.predict()
    assert optimizer.backend == "portable" and all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_every_write_raises_the_version(name, fused):
    """So that autograd refuses a backward pass through weights that have changed since the forward pass."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = make(name, model, lr=0.1, fused=fused)
    inputs = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        optimizer.predict()
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        loss = model(inputs).square().mean()
        before = [p._version for p in model.parameters()]
        optimizer.update(1.0)
        assert all(p._version > version for p, version in zip(model.parameters(), before, strict=True))
        with pytest.raises(RuntimeError):
            loss.backward()
    if name == "koala-m":
        loss = model(inputs).square().mean()
        optimizer.predict()
        with pytest.raises(RuntimeError):
            loss.backward()
    for state in optimizer.state.values():
        assert all(state[buffer]._version > 0 for buffer in optimizer.buffers)
