"""Filters that observe outputs: what their face takes and skips, and what their state goes through."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import koala
from tests.refused import rejected

from .cases import OUTPUT_IDS, OUTPUTS, assert_same, batch, closure_for, make, net, snapshot, train

KIND = pytest.mark.parametrize(("name", "hyper"), OUTPUTS, ids=OUTPUT_IDS)


# --- state


@KIND
def test_a_kept_state_dict_keeps_the_filters_scalars(name, hyper):
    model = net()
    optimizer = make(name, model, **hyper)
    train(model, optimizer, 2)
    kept = [value for value in optimizer.state_dict()["param_groups"][0].values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in kept]
    train(model, optimizer, 2, first=2)
    assert len(kept) >= 3 and all(map(torch.equal, kept, before))


@KIND
def test_a_state_of_something_else_is_refused_and_changes_nothing(name, hyper):
    model, other, wider = net(), net(), net()
    wider.linear = nn.Linear(16, 4).double()
    optimizer = make(name, model, **hyper)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)
    sgd = torch.optim.SGD(other.parameters(), momentum=0.9)
    F.cross_entropy(other(batch(0)[0]), batch(0)[1]).backward()
    sgd.step()
    states = [sgd.state_dict(), make(name, wider, **hyper).state_dict()]
    states += [make(kind, other).state_dict() for kind in ("diagonal-ekf", "lkf") if kind != name]
    for state in states:
        with pytest.raises(ValueError):
            optimizer.load_state_dict(state)
    assert_same(snapshot(model, optimizer), before, rtol=0, atol=0)


def test_groups_differ_in_what_is_a_weights_own():
    model = net()
    groups = [{"params": model.conv.parameters(), "p0": 0.3, "q": 0.1}, {"params": model.linear.parameters()}]
    optimizer = koala.DiagonalEKF(groups, 0.05)
    optimizer.predict()
    optimizer.predict()  # a prediction stands
    torch.testing.assert_close(optimizer.state[model.conv.weight]["p"], torch.full_like(model.conv.weight, 0.4))
    torch.testing.assert_close(optimizer.state[model.linear.bias]["p"], torch.full_like(model.linear.bias, 0.05))
    with rejected(ValueError, "beta"):
        koala.DiagonalEKF([{"params": model.parameters(), "beta": 0.5}])
    with rejected(ValueError, "p0", 0.0):
        koala.DiagonalEKF([{"params": model.parameters(), "p0": 0.0}])


@pytest.mark.parametrize(
    ("name", "hyper"), [*OUTPUTS, ("diagonal-ekf", {"q": 0.01, "gamma": 0.99})], ids=[*OUTPUT_IDS, "diagonal-ekf-gamma"]
)
def test_a_layer_frozen_later_is_a_layer_less(name, hyper):
    model, other = net(), net()
    optimizer, before = make(name, model, **hyper), net().linear.weight
    model.linear.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in optimizer.state[model.linear.weight].items()}
    kept = [p for p in other.parameters() if p is not other.linear.weight]
    train(model, optimizer, 3)
    train(other, koala.create_optimizer(name, kept, **hyper), 3)
    assert state and all(torch.equal(value, optimizer.state[model.linear.weight][key]) for key, value in state.items())
    assert torch.equal(model.linear.weight, before)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_an_empty_first_group():
    layer = nn.Linear(2, 2)
    optimizer = koala.DiagonalEKF([{"params": []}, {"params": layer.parameters()}])
    optimizer.step(lambda: (layer(torch.ones(3, 2)), torch.tensor([0, 1, 1])))
    assert int(optimizer.diagnostics()["skipped"]) == 0


def test_variances_are_drawn_between_two_bounds():
    torch.manual_seed(0)
    layer = nn.Linear(100, 100)
    optimizer = koala.DiagonalEKF(layer.parameters(), (0.1, 0.3))
    p = optimizer.state[layer.weight]["p"]
    assert 0.1 <= p.min() < 0.101 and 0.299 < p.max() <= 0.3 and abs(p.mean() - 0.2) < 0.01


# --- the step


@KIND
def test_the_two_faces_are_one(name, hyper):
    model, other = net(), net()
    one, two = make(name, model, **hyper), make(name, other, **hyper)
    train(model, one, 3)
    for step in range(3):
        two.predict()
        two.update(*closure_for(other, two, batch(step))())
    assert_same(snapshot(model, one), snapshot(other, two), rtol=0, atol=0)


@KIND
def test_a_sample_left_out_is_a_sample_less(name, hyper):
    model, other = net(), net()
    one, two = make(name, model, **hyper), make(name, other, **hyper)
    x, y = batch(0, size=5)
    y[2] = -100
    one.step(lambda: (model(x), y))
    kept = [0, 1, 3, 4]
    two.step(lambda: (other(x[kept]), y[kept]))
    assert_same(snapshot(model, one), snapshot(other, two), rtol=1e-9, atol=1e-12)


@KIND
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_may_be_integers_of_any_width(name, hyper, dtype):
    model, other = net(), net()
    one, two = make(name, model, **hyper), make(name, other, **hyper)
    x, y = batch(0, size=5)
    one.step(lambda: (model(x), y.to(dtype)))
    two.step(lambda: (other(x), y))
    assert_same(snapshot(model, one), snapshot(other, two), rtol=0, atol=0)


@KIND
@pytest.mark.parametrize("broken", ["outputs", "all samples left out"])
def test_what_cannot_be_measured_is_skipped_and_the_prediction_stands(name, hyper, broken):
    model = net()
    optimizer = make(name, model, **hyper)
    train(model, optimizer, 2)
    optimizer.predict()
    before = snapshot(model, optimizer)
    x, y = batch(5)
    outputs = model(x)
    if broken == "outputs":
        outputs = outputs * float("nan")
    else:
        y = torch.full_like(y, -100)
    optimizer.update(outputs, y)
    after = snapshot(model, optimizer)
    assert after.pop("filter.skipped") == before.pop("filter.skipped") + 1
    optimizer.predict()
    assert_same(before, after, rtol=0, atol=0)
