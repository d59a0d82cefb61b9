"""Filters that observe outputs: what their face takes and skips, and what their state goes through."""

import copy
import pickle

import pytest
import torch
from torch import nn

import koala

from .test_ekf import batch, net, run, trained, weights
from .test_saving import through_file

KINDS = {
    "diagonal-ekf": {},
    "diagonal-ekf, followed": {"r": None, "noise": "innovation", "beta": 0.9, "q": 0.01},
    "lkf": {"likelihood": "categorical", "block_size": 5},
}
KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind, model, **hyper):
    return koala.create_optimizer(kind.split(",")[0], model.parameters(), **{**KINDS[kind], **hyper})


def snapshot(model, optimizer):
    """Weights, covariances and the filter's scalars, as copies."""
    state = {f"{i}.{key}": value.clone() for i, p in enumerate(trained(model))
             for key, value in optimizer.state[p].items()}  # fmt: skip
    return {"weights": weights(model).clone(), **state, **{k: v.clone() for k, v in optimizer.diagnostics().items()}}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- state


@KIND
def test_a_kept_state_dict_keeps_the_filters_scalars(kind):
    model = net()
    optimizer = make(kind, model)
    run(model, optimizer, 2)
    kept = [value for value in optimizer.state_dict()["param_groups"][0].values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in kept]
    run(model, optimizer, 2, first=2)
    assert len(kept) >= 3 and all(map(torch.equal, kept, before))


@KIND
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_continues_bit_identically(kind, way):
    model = net()
    optimizer = make(kind, model)
    run(model, optimizer, 3)
    optimizer.predict()
    if way == "state_dict":
        restored = net(seed=1)
        restored.load_state_dict(through_file(model.state_dict()))
        resumed = koala.create_optimizer(kind.split(",")[0], restored.parameters(),
                                         **({"block_size": 5} if kind == "lkf" else {}))  # fmt: skip
        resumed.load_state_dict(through_file(optimizer.state_dict()))
    else:
        restored, resumed = copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(
            pickle.dumps((model, optimizer)))  # fmt: skip
    for network, filtered in ((model, optimizer), (restored, resumed)):
        run(network, filtered, 3, first=3)
    assert_same(snapshot(model, optimizer), snapshot(restored, resumed))


@KIND
def test_a_loaded_state_is_a_copy(kind):
    model, other = net(), net()
    optimizer, loaded = make(kind, model), make(kind, other)
    run(model, optimizer, 2)
    state = optimizer.state_dict()
    loaded.load_state_dict(state)
    before = snapshot(model, optimizer)
    run(other, loaded, 2, first=2)
    assert_same(before, snapshot(model, optimizer))


@KIND
def test_a_state_of_something_else_is_refused_and_changes_nothing(kind):
    model = net()
    optimizer = make(kind, model)
    run(model, optimizer, 1)
    before = snapshot(model, optimizer)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(batch(0)[0]).sum().backward()
    sgd.step()
    states = [sgd.state_dict(), make(kind, net(outputs=2)).state_dict()]
    states += [make(other, net()).state_dict() for other in ("diagonal-ekf", "lkf") if other != kind.split(",")[0]]
    model.load_state_dict({**model.state_dict(), **net().state_dict()})
    before["weights"] = weights(model).clone()
    for state in states:
        with pytest.raises(ValueError, match="another"):
            optimizer.load_state_dict(state)
    assert_same(before, snapshot(model, optimizer))


def test_groups_differ_in_what_is_a_weights_own():
    model = net()
    groups = [{"params": model.first.parameters(), "p0": 0.3, "q": 0.1}, {"params": model.second.parameters()}]
    optimizer = koala.DiagonalEKF(groups, 0.05)
    optimizer.predict()
    optimizer.predict()  # a prediction stands
    torch.testing.assert_close(optimizer.state[model.first.weight]["p"], torch.full_like(model.first.weight, 0.4))
    torch.testing.assert_close(optimizer.state[model.second.bias]["p"], torch.full_like(model.second.bias, 0.05))
    with pytest.raises(ValueError, match="beta belongs to the whole filter"):
        koala.DiagonalEKF([{"params": model.parameters(), "beta": 0.5}])
    with pytest.raises(ValueError, match="p0 must be a number above 0"):
        koala.DiagonalEKF([{"params": model.parameters(), "p0": 0.0}])


def test_variances_are_drawn_between_two_bounds():
    torch.manual_seed(0)
    layer = nn.Linear(100, 100)
    optimizer = koala.DiagonalEKF(layer.parameters(), (0.1, 0.3))
    p = optimizer.state[layer.weight]["p"]
    assert 0.1 <= p.min() < 0.101 and 0.299 < p.max() <= 0.3 and abs(p.mean() - 0.2) < 0.01


@KIND
def test_frozen_and_unused_weights_stay_and_frozen_ones_cost_nothing(kind):
    model = net()
    optimizer = make(kind, model)
    frozen, unused = model.frozen.clone(), model.unused.clone()
    run(model, optimizer, 3)
    assert torch.equal(model.frozen, frozen) and torch.equal(model.unused, unused)
    assert model.frozen not in optimizer.state


def test_a_weight_that_thaws_is_learnt():
    model = net()
    model.first.requires_grad_(False)
    optimizer = koala.DiagonalEKF(model.parameters())
    run(model, optimizer, 1)
    before = model.first.weight.clone()
    model.first.requires_grad_(True)
    run(model, optimizer, 1)
    assert not torch.equal(model.first.weight, before)


# --- the step


@KIND
def test_the_two_faces_are_one(kind):
    model, other = net(), net()
    one, two = make(kind, model), make(kind, other)
    run(model, one, 3)
    for step in range(3):
        x, y = batch(step)
        two.predict()
        two.update(other(x), y)
    assert_same(snapshot(model, one), snapshot(other, two))


@KIND
def test_a_sample_left_out_is_a_sample_less(kind):
    model, other = net(), net()
    one, two = make(kind, model), make(kind, other)
    x, y = batch(0, size=5)
    y[2] = -100
    one.step(lambda: (model(x), y))
    kept = [0, 1, 3, 4]
    two.step(lambda: (other(x[kept]), y[kept]))
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-14)


@KIND
@pytest.mark.parametrize("broken", ["outputs", "all samples left out"])
def test_what_cannot_be_measured_is_skipped_and_the_prediction_stands(kind, broken):
    model = net()
    optimizer = make(kind, model)
    run(model, optimizer, 2)
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
    assert after.pop("skipped") == before.pop("skipped") + 1
    optimizer.predict()
    assert_same(before, after)
