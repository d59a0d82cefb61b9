"""What torch.optim promises its users, over every optimizer: steps, losses, schedulers, hooks, scalers."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import koala
from koala import LossStats
from tests.refused import rejected

from .cases import IDS, NAMES, VARIANTS, assert_same, batch, closure_for, make, net, snapshot

NEEDS_LOSS = [info.name for info in koala.list_optimizers() if info.needs_loss]


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("style", ["update", "stats", "loss", "observe", "microbatches"])
def test_step_with_a_closure_is_every_other_way_to_say_the_loss(name, hyper, style):
    one, other = net(), net()
    reference, optimizer = make(name, one, **hyper), make(name, other, **hyper)
    for step in range(4):
        returned = reference.step(closure_for(one, reference, batch(step)))
        closure = closure_for(other, optimizer, batch(step))
        if style == "stats":
            optimizer.step(lambda closure=closure: LossStats.from_losses(closure()))
            continue
        optimizer.predict()
        if style in ("update", "loss"):
            losses = closure()
            torch.testing.assert_close(returned, losses)
            say = optimizer.update if style == "update" else optimizer.step
            say(loss=losses.mean(), loss_var=losses.square().mean())
            continue
        optimizer.zero_grad()
        images, targets = batch(step)
        losses = F.cross_entropy(other(images), targets, reduction="none")
        for part in losses.split(8 if style == "observe" else 3):
            (optimizer.observe(part) * len(part) / 8).backward(retain_graph=True)
        optimizer.step()
    assert_same(snapshot(other, optimizer), snapshot(one, reference), rtol=1e-12, atol=1e-13)


def test_a_scalar_loss_is_one_sample():
    model = net()
    optimizer = koala.VanillaKOALA(model.parameters())
    losses = closure_for(model, optimizer, batch(0))
    optimizer.step(lambda: losses().mean())
    expected = 0.9 + 0.1 * F.cross_entropy(net()(batch(0)[0]), batch(0)[1]).item() ** 2
    assert optimizer.diagnostics()["R"].item() == pytest.approx(expected, rel=1e-12)


READINGS = [("second_moment", 5.0), ("squared_mean", 4.0), ("variance", 1.0)]


@pytest.mark.parametrize("fused", [False, "reference"])
def test_a_loss_var_below_any_mean_of_squares_counts_as_none(fused):
    """As of somebody who gives the variance of the losses, 0, beside a bound."""
    model = nn.Linear(2, 1)
    optimizer = make("koala++", model, alpha_r=0.9, lower_bound=1.0, measurement="second_moment", fused=fused)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(loss=2.0, loss_var=0.0)
    assert optimizer.diagnostics()["R"].item() == pytest.approx(0.9)


@pytest.mark.parametrize(("measurement", "expected"), READINGS)
def test_readings_of_loss_var(measurement, expected):
    model = nn.Linear(2, 1)
    optimizer = koala.KOALAPlusPlus(model.parameters(), alpha_r=0.0, measurement=measurement)
    losses = torch.tensor([1.0, 3.0])  # mean 2, mean of squares 5
    model(torch.ones(1, 2)).sum().backward()
    optimizer.observe(losses)
    optimizer.step()
    assert optimizer.diagnostics()["R"].item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=9, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]),
        lr_scheduler.ReduceLROnPlateau,
    ],
)
def test_schedulers_do_not_warn(name, make_schedule):
    """Of steps by update(), torch knows of none by itself."""
    model = net()
    optimizer = make(name, model, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make_schedule(optimizer)
        for step in range(4):
            loss = closure_for(model, optimizer, batch(step))().mean()
            optimizer.update(loss, loss**2)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss.detach()) if plateau else scheduler.step()


@pytest.mark.parametrize("name", NAMES)
def test_hooks_fire_once(name):
    """Of a step, in both styles, and of what torch does to the state, around the optimizers' own hooks."""
    model = net()
    optimizer = make(name, model)
    seen = []
    for what in ("step", "state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            hook = getattr(optimizer, f"register_{what}_{when}_hook")
            hook(lambda *_, event=f"{what} {when}": seen.append(event))
    optimizer.step(closure_for(model, optimizer, batch(0)))
    optimizer.predict()
    closure_for(model, optimizer, batch(1))()
    optimizer.update(1.0, 1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    pairs = ("step", "step", "state_dict", "load_state_dict")
    assert seen == [f"{what} {when}" for what in pairs for when in ("pre", "post")]


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(name):
    """Norms are those of the unscaled gradients; a step whose gradients overflowed is left out."""
    one, other = net(torch.float32), net(torch.float32)
    reference, optimizer = make(name, one, lr=0.1), make(name, other, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        data = batch(step, dtype=torch.float32)
        reference.predict()
        losses = closure_for(one, reference, data)()
        reference.step(loss=losses.mean(), loss_var=losses.square().mean())
        optimizer.predict()
        optimizer.zero_grad()
        losses = F.cross_entropy(other(data[0]), data[1], reduction="none")
        scaler.scale(losses.mean()).backward()
        scaler.step(optimizer, loss=losses.mean(), loss_var=losses.square().mean())
        scaler.update()
    assert_same(snapshot(other, optimizer), snapshot(one, reference), rtol=1e-4, atol=1e-6)
    before = snapshot(other, optimizer)
    closure_for(other, optimizer, batch(9, dtype=torch.float32))()
    other.scale.grad.fill_(float("inf"))
    scaler.step(optimizer, loss=1.0)
    scaler.update()
    assert_same(snapshot(other, optimizer), before, rtol=0, atol=0)


def test_registry():
    observes = {info.name: info.observes for info in koala.list_optimizers()}
    assert observes == {
        **dict.fromkeys(["koala-v", "koala-m", "koala++"], "loss"),
        **dict.fromkeys(["sofim", "sgdf"], "gradient"),
        **dict.fromkeys(["diagonal-ekf", "lkf"], "outputs"),
    }
    with rejected(ValueError, "koala-x", *observes):
        koala.create_optimizer("koala-x", net().parameters())
    for info in koala.list_optimizers():
        assert issubclass(info.cls, torch.optim.Optimizer) and info.description and info.paper


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_at_rate_0_is_a_step(name, kind):
    """The first of a warm-up, by whichever call: all count it."""
    finals = []
    for style in ("step", "update", "closure"):
        model = net()
        lr = torch.tensor(0.1, dtype=torch.float64) if kind == "tensor" else 0.1
        optimizer = make(name, model, lr=lr)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
        before = model.linear.weight.detach().clone()
        for step in range(5):
            optimizer.predict()
            closure_for(model, optimizer, batch(step))()
            if style == "closure":
                optimizer.step(lambda: 1.5)
            elif style == "update":
                optimizer.update(1.5)
            elif optimizer.needs_loss:
                optimizer.step(loss=1.5)
            else:
                optimizer.step()
            schedule.step()
            assert step or torch.equal(model.linear.weight, before)
        finals.append(snapshot(model, optimizer))
        if name in ("sofim", "sgdf"):
            held = optimizer.hyper if name == "sofim" else optimizer.state[model.linear.weight]
            assert held["t"] == 5
    for final in finals[1:]:
        assert_same(final, finals[0], rtol=0, atol=0)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_a_forgotten_loss_is_refused_at_any_rate(name, lr):
    model = net()
    optimizer = make(name, model, lr=lr)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError):
        optimizer.step()
