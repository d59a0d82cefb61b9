"""Which losses count: a loss lives exactly as long as its gradient, and is never taken for more than a rank saw."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import koala
from koala import LossStats

from .cases import NAMES, assert_same, batch, make, net, snapshot, train

NEEDS_LOSS = [info.name for info in koala.list_optimizers() if info.needs_loss]


def losses_of(model, step):
    images, targets = batch(step)
    return F.cross_entropy(model(images), targets, reduction="none")


def trained_with(name, loop, **hyper):
    """State after `loop(model, optimizer, step)` for four steps."""
    model = net()
    optimizer = make(name, model, **hyper)
    for step in range(4):
        optimizer.predict()
        loop(model, optimizer, step)
    return snapshot(model, optimizer)


def plain(model, optimizer, step):
    optimizer.zero_grad()
    losses = losses_of(model, step)
    losses.mean().backward()
    optimizer.update(losses.mean(), losses.square().mean())


def validates(model, optimizer, step):
    optimizer.zero_grad()
    optimizer.observe(losses_of(model, step)).backward()
    with torch.no_grad():
        optimizer.observe(losses_of(model, 50))
    optimizer.observe(losses_of(model, 51))  # gradients recorded, never asked for
    optimizer.update()


def gives_up_a_batch(model, optimizer, step):
    optimizer.observe(losses_of(model, 60)).backward()  # and then the step is skipped
    optimizer.zero_grad()
    optimizer.observe(losses_of(model, step)).backward()
    optimizer.update()


def zeroes_between_forward_and_backward(model, optimizer, step):
    loss = optimizer.observe(losses_of(model, step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.update()


def accumulates(model, optimizer, step):
    optimizer.zero_grad()
    images, targets = batch(step)
    for part in range(4):
        piece = slice(2 * part, 2 * part + 2)
        (optimizer.observe(F.cross_entropy(model(images[piece]), targets[piece], reduction="none")) / 4).backward()
    optimizer.update()


def is_given_another(model, optimizer, step):
    optimizer.zero_grad()
    losses = losses_of(model, step)
    (optimizer.observe(losses)).backward()
    optimizer.loss_buffer.observe(torch.full((100,), 7.0))
    optimizer.update(LossStats.from_losses(losses))


def scales_the_loss(model, optimizer, step):
    optimizer.zero_grad()
    (optimizer.observe(losses_of(model, step)) * 1024).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= 1024
    optimizer.step()


def observes_within_a_closure(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = optimizer.observe(losses_of(model, step))
        loss.backward()
        return loss  # what was observed counts

    optimizer.step(closure)


LOOPS = (
    validates, gives_up_a_batch, zeroes_between_forward_and_backward, accumulates, is_given_another, scales_the_loss,
    observes_within_a_closure,
)  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_each_loop_sees_the_same_losses(name, loop):
    assert_same(trained_with(name, loop), trained_with(name, plain), rtol=1e-12, atol=1e-13)


def test_losses_count_once_and_where_gradients_are_recorded():
    model = net()
    optimizer = koala.VanillaKOALA(model.parameters())
    loss = optimizer.observe(losses_of(model, 0))
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert optimizer.loss_buffer.take().count == 8
    with torch.no_grad():
        optimizer.observe(LossStats.from_losses(torch.ones(3)))
    assert optimizer.loss_buffer.empty


@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_a_step_the_scaler_skipped_leaves_no_loss(name):
    """One fp16-like overflow: the infinite loss that came with it is gone before the next one counts."""
    model = net(torch.float32)
    optimizer = make(name, model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        images, targets = batch(step, dtype=torch.float32)
        optimizer.zero_grad()
        optimizer.predict()
        losses = F.cross_entropy(model(images) * (torch.inf if step == 1 else 1), targets, reduction="none")
        scaler.scale(optimizer.observe(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.diagnostics()["R"].isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_a_copied_dict_shares_the_losses(name):
    """As Lightning Fabric's wrapper does it: another object with the optimizer's __dict__."""
    model = net()
    optimizer = make(name, model)
    wrapper = object.__new__(type("Wrapper", (type(optimizer),), {}))
    wrapper.__dict__ = dict(optimizer.__dict__)
    truth = trained_with(name, plain)
    for step in range(4):
        wrapper.predict()
        wrapper.zero_grad()
        optimizer.observe(losses_of(model, step)).backward()
        wrapper.step()
    assert optimizer.loss_buffer.empty
    assert_same(snapshot(model, optimizer), truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_forgets_what_was_observed(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 1)
    optimizer.observe(torch.ones(3))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.loss_buffer.empty


@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_a_lower_bound_lets_losses_fall_below_zero(name):
    """Gaussian negative log-likelihood: with the bound 0 it stops there, with a lower one it goes on."""
    finals = {}
    for bound in (0.0, -3.0):
        inputs = torch.linspace(-1, 1, 64, dtype=torch.float64)[:, None]
        torch.manual_seed(0)
        model = nn.Linear(1, 2).double()
        optimizer = make(name, model, lower_bound=bound, lr=0.05)

        def closure(model=model, optimizer=optimizer, inputs=inputs):
            optimizer.zero_grad()
            mean, log_variance = model(inputs).unbind(1)
            targets = 0.5 * inputs[:, 0] + 0.1 * torch.cos(40 * inputs[:, 0])
            losses = 0.5 * (log_variance + (targets - mean).square() / log_variance.exp())
            losses.mean().backward()
            return losses

        for _ in range(200):
            final = optimizer.step(closure).mean().item()
        finals[bound] = final
    assert -0.2 < finals[0.0]
    assert finals[-3.0] < -1.2


@pytest.mark.parametrize("name", NAMES)
def test_lr_comes_second_and_the_rest_by_name(name):
    cls = next(info.cls for info in koala.list_optimizers() if info.name == name)
    assert cls(net().parameters(), 1e-3).param_groups[0]["lr"] == 1e-3
    with pytest.raises(TypeError):
        cls(net().parameters(), 1e-3, 0.1)


@pytest.mark.parametrize("name", NEEDS_LOSS)
def test_compiled_steps_do_not_pile_up_losses(name):
    """torch.compile around the whole train step, and around step() alone."""
    finals = []
    for compiled in ("eager", "step", "train step"):
        model = net()
        optimizer = make(name, model, weight_decay=0.01)
        step_it = torch.compile(optimizer.step, backend="eager") if compiled == "step" else optimizer.step

        def one(step, model=model, optimizer=optimizer, step_it=step_it):
            optimizer.zero_grad()
            optimizer.predict()
            optimizer.observe(losses_of(model, step)).backward()
            step_it()

        run = torch.compile(one, backend="eager") if compiled == "train step" else one
        for step in range(3):
            run(step)
        assert optimizer.loss_buffer.empty
        finals.append(snapshot(model, optimizer))
    for final in finals[1:]:
        assert_same(final, finals[0], rtol=1e-9, atol=1e-11)
