"""Groups, rates, dtypes and layouts of memory: what is stepped changes, how it lies does not matter."""

import pytest
import torch
from torch import nn

import koala

from .cases import NAMES, assert_same, make, net, snapshot, train


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_rate_and_decay(name):
    model, frozen_rate = net(), net()
    groups = [
        {"params": frozen_rate.conv.parameters(), "lr": 0.0},
        {"params": frozen_rate.linear.parameters(), "weight_decay": 0.1},
    ]
    optimizer = koala.create_optimizer(name, groups, lr=0.1)
    before = frozen_rate.conv.weight.clone()
    train(frozen_rate, optimizer, 3)
    torch.testing.assert_close(frozen_rate.conv.weight, before, rtol=0, atol=0)
    plain = koala.create_optimizer(name, model.linear.parameters(), lr=0.1)
    train(model, plain, 3)
    assert not torch.allclose(model.linear.weight, frozen_rate.linear.weight)


def test_two_groups_are_one_filter():
    """Splitting the parameters into groups of equal settings changes nothing: P, q and the maximum run over all."""
    for name in NAMES:
        one, other = net(), net()
        joint = make(name, one, weight_decay=0.01)
        split = koala.create_optimizer(
            name, [{"params": [p]} for p in other.parameters()], weight_decay=0.01, lr=joint.defaults["lr"]
        )
        train(one, joint, 4)
        train(other, split, 4)
        assert_same(snapshot(other, split), snapshot(one, joint), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_rate_as_a_tensor(name, fused):
    one, other = net(), net()
    number = make(name, one, lr=0.3, fused=fused)
    tensor = make(name, other, lr=torch.tensor(0.3, dtype=torch.float64), fused=fused)
    for optimizer, model in ((number, one), (tensor, other)):
        train(model, optimizer, 2)
        optimizer.param_groups[0]["lr"] *= 0.5
        train(model, optimizer, 2, first=2)
    assert_same(snapshot(other, tensor), snapshot(one, number), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_named_parameters_keep_their_names(name):
    optimizer = make(name, net().named_parameters())
    names = [key for key, _ in net().named_parameters()]
    again = make(name, net().named_parameters())
    again.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["param_names"] == again.param_groups[0]["param_names"] == names


@pytest.mark.parametrize("name", NAMES)
def test_add_param_group_joins_the_filter(name):
    model = net()
    optimizer = koala.create_optimizer(name, model.conv.parameters(), lr=0.1)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model.linear.parameters(), "lr": 0.05})
    before = model.linear.weight.clone()
    train(model, optimizer, 2, first=2)
    assert not torch.equal(before, model.linear.weight)
    for key in set(optimizer.filter_state) - {"go"}:
        assert optimizer.param_groups[1][key] is optimizer.diagnostics()[key]


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_changes_nothing(name, fused):
    """Channels-last weights, a weight that is a strided view, gradients laid out unlike their weights."""
    finals = []
    for layout in ("contiguous", "channels_last", "strided", "late"):
        model = net()
        if layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        if layout == "strided":
            base = torch.zeros(3, 32, dtype=torch.float64)
            base[:, ::2] = model.linear.weight.detach()
            model.linear.weight = nn.Parameter(base[:, ::2])
            assert not model.linear.weight.is_contiguous()
            model.linear.weight.register_hook(lambda grad: grad.t().contiguous().t())
        optimizer = make(name, model, weight_decay=0.01, fused=fused)
        train(model, optimizer, 2)
        if layout == "late":
            model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)
        train(model, optimizer, 2, first=2)
        finals.append(snapshot(model, optimizer))
    for final in finals[1:]:
        assert_same(final, finals[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
    optimizer = make(name, model, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        losses = model[1](model[0](torch.randn(5, 4)).double()).square().mean(1)
        losses.mean().backward()
        optimizer.step(loss=losses.mean(), loss_var=losses.square().mean())
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert all(p.isfinite().all() for p in model.parameters())


def stepped(optimizer, weight, loss):
    """A step on a loss of one weight."""
    optimizer.zero_grad()
    optimizer.predict()
    value = loss(weight)
    value.backward()
    optimizer.step(loss=value.detach())


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_transposed_between_steps(name, fused):
    """Its address and its shape stay: only its strides tell."""
    target = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    finals = []
    for how in (lambda w: w.t(), lambda w: w.t().contiguous()):
        weight = nn.Parameter(torch.eye(3, dtype=torch.float64) + target / 7)
        optimizer = make(name, [weight], lr=0.1, fused=fused)
        for step in range(4):
            stepped(optimizer, weight, lambda w: (w - target).square().mean())
            if step == 1:
                weight.data = how(weight.data)
        finals.append(weight.detach().clone())
    torch.testing.assert_close(*finals, rtol=1e-12, atol=1e-13)


def test_rows_of_a_weight_are_cut_off_between_steps(fused):
    """As in structured pruning: the address and the strides stay. A filter without buffers continues."""
    finals = []
    for how in (lambda w: w[:2], lambda w: w[:2].clone()):
        weight = nn.Parameter(torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3))
        optimizer = make("koala-v", [weight], fused=fused)
        for step in range(4):
            stepped(optimizer, weight, lambda w: w.square().mean())
            if step == 1:
                weight.data, weight.grad = how(weight.data), None
        finals.append(weight.detach().clone())
    torch.testing.assert_close(*finals, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"koala-v"}))
def test_buffers_of_a_weight_that_was_cut_are_refused(name):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = make(name, [weight])
    stepped(optimizer, weight, lambda w: w.square().mean())
    weight.data, weight.grad = weight.data[:2], None
    with pytest.raises(ValueError):
        stepped(optimizer, weight, lambda w: w.square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_torch_has_yet_to_negate(name, fused):
    """Of one number in a complex computation, autograd keeps a view with its negative bit set."""
    finals = []
    for resolved in (False, True):
        weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        optimizer = make(name, [weight], lr=0.1, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.predict()
            loss = (torch.complex(torch.zeros_like(weight), weight).conj() * (1 + 2j)).imag + 5
            loss.backward()
            assert weight.grad.is_neg()
            weight.grad = weight.grad.resolve_neg() if resolved else weight.grad
            optimizer.step(loss=loss.detach())
        finals.append(weight.detach().clone())
    assert torch.equal(*finals)
