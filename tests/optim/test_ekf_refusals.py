"""Filters that observe outputs: what they refuse, before they change anything."""

import pytest
import torch
from torch import nn

import koala
from tests.refused import rejected

from .cases import make
from .test_ekf import batch, net, run, weights
from .test_ekf_face import KIND


def norm(kind):
    return nn.Sequential(nn.Linear(4, 6), kind(6), nn.Linear(6, 3)).double()


@KIND
def test_samples_that_depend_on_each_other_are_refused(name, hyper):
    model = norm(nn.BatchNorm1d)
    optimizer = make(name, model, **hyper)
    x, y = batch(0)
    before = weights(model)
    with rejected(ValueError, "BatchNorm"):
        optimizer.step(lambda: (model(x), y))
    assert torch.equal(weights(model), before)
    optimizer.step(lambda: (model.eval()(x), y))
    assert not torch.equal(weights(model), before)


def test_norms_of_one_sample_are_none_of_a_batch():
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    instance = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    for model, count in ((images, 1), (instance, 3), (norm(nn.LayerNorm), 3)):
        x = torch.randn(count, 4) if isinstance(model[0], nn.Linear) else torch.randn(count, 1, 4, 4)
        optimizer = koala.DiagonalEKF(model.parameters())
        optimizer.step(lambda model=model, x=x, count=count: (model(x.double()), torch.zeros(count, dtype=torch.long)))


@pytest.mark.parametrize(
    ("outputs", "targets", "names"),
    [
        (lambda x: x.detach(), lambda y: y, ["outputs"]),
        (lambda x: x[0], lambda y: y, ["outputs", "[B, C]", "(3,)"]),
        (lambda x: x, lambda y: y[:2], ["(5,)", "(2,)"]),
        (lambda x: x, lambda y: y + 7, ["target"]),
        (lambda x: x, lambda y: y.double(), ["targets", "torch.float64"]),
        (lambda x: torch.ones(5, 3, requires_grad=True), lambda y: y, ["outputs"]),
    ],
)
@KIND
def test_a_measurement_that_does_not_fit_is_refused(name, hyper, outputs, targets, names):
    model = net()
    optimizer = make(name, model, **hyper)
    x, y = batch(0)
    before = weights(model)
    with rejected(ValueError, *names):
        optimizer.update(outputs(model(x)), targets(y))
    assert torch.equal(weights(model), before)


def test_targets_of_the_other_likelihood_are_refused():
    model = net()
    with rejected(ValueError, "likelihood=gaussian"):
        koala.DiagonalEKF(model.parameters(), likelihood="gaussian", r=1.0).update(model(batch(0)[0]), batch(0)[1])


@KIND
@pytest.mark.parametrize("returned", [None, 1.0, torch.ones(2, 3), (1, 2, 3)])
def test_a_closure_that_returns_no_measurement_is_refused(name, hyper, returned):
    optimizer = make(name, net(), **hyper)
    with rejected(ValueError, "(outputs, targets)"):
        optimizer.step(lambda: returned)
    with rejected(ValueError, "(outputs, targets)"):
        optimizer.step()


def test_weights_that_move_need_a_prediction():
    model = net()
    optimizer = koala.DiagonalEKF(model.parameters(), gamma=0.9)
    x, y = batch(0)
    with rejected(RuntimeError, "gamma", "predict"):
        optimizer.update(model(x), y)
    optimizer.predict()
    optimizer.update(model(x), y)


@KIND
def test_a_gradient_scaler_is_refused(name, hyper):
    model = net()
    optimizer = make(name, model, **hyper)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batch(0)[0]).sum()).backward()
    with rejected(RuntimeError, "GradScaler"):
        scaler.step(optimizer)


@KIND
def test_several_ranks_are_refused(name, hyper, two_ranks):
    model = net()
    with pytest.raises(NotImplementedError):
        run(model, make(name, model, **hyper), 1)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("diagonal-ekf", {"p0": 0.0}),
        ("diagonal-ekf", {"p0": (0.2, 0.1)}),
        ("diagonal-ekf", {"gamma": 0.0}),
        ("diagonal-ekf", {"q": -1.0}),
        ("diagonal-ekf", {"alpha": float("nan")}),
        ("diagonal-ekf", {"beta": 1.0}),
        ("diagonal-ekf", {"robust": 0.0}),
        ("diagonal-ekf", {"likelihood": "poisson"}),
        ("diagonal-ekf", {"likelihood": "gaussian"}),
        ("diagonal-ekf", {"covariance": "dense"}),
        ("diagonal-ekf", {"noise": "white"}),
        ("diagonal-ekf", {"chunk_size": 0}),
        ("lkf", {"block_size": 0}),
        ("lkf", {"lam": 0.0}),
        ("lkf", {"nu": 1.1}),
        ("lkf", {"batch_rule": "deepmd", "likelihood": "categorical"}),
        ("lkf", {"batch_rule": "deepmd", "r": None}),
        ("lkf", {"batch_rule": "deepmd", "robust": 1.0}),
    ],
    ids=str,
)
def test_wrong_hyper_parameters_are_refused(name, hyper):
    with rejected(ValueError, list(hyper)[-1] if hyper != {"likelihood": "gaussian"} else "r"):
        koala.create_optimizer(name, net().parameters(), **hyper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
@KIND
def test_weights_that_round_off_a_step_are_refused(name, hyper, dtype):
    with rejected(ValueError, "float32", "float64"):
        make(name, nn.Linear(2, 2).to(dtype), **hyper)
