"""What every optimizer of `koala`, `koala.baselines` and `koala.extras.metric` bears: copies of its state, torch's
modes, weights that change.

Each is a report of a neighbouring project; docs/clusters.md lists them.
"""

import copy
import importlib
import pkgutil

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F
from torch.optim import Optimizer

import koala
from koala import baselines
from koala.extras import metric
from koala.training.optimizers import NEEDS, Needs

REQUIRED = {"AdaBayes": {"batch_size": 6}, "LayerwiseEKF": {"likelihood": "categorical", "block_size": 40}}
BASES = {"KalmanOptimizer", "OutputFilter", "CopiedState", "OneGroup", "PolyakOptimizer", "PreconditionedSGD"}


def _public() -> dict[str, type[Optimizer]]:
    modules = [
        importlib.import_module(f"koala.baselines.{entry.name}") for entry in pkgutil.iter_modules(baselines.__path__)
    ]
    found = {name: getattr(koala, name) for name in koala.__all__}
    for module in (*modules, metric):
        found |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    ours = {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    return {name: kind for name, kind in ours.items() if kind.__module__.startswith("koala.") and name not in BASES}


KINDS = _public()
KIND = pytest.mark.parametrize("kind", KINDS)
FILTER = pytest.mark.parametrize("kind", [name for name in KINDS if hasattr(koala, name)])


def test_the_list_is_of_all():
    assert {"MomentumKOALA", "DiagonalEKF", "AdaFisherW", "KFAC", "MetricKOALA", "MoMoAdam", "Shampoo"} <= KINDS.keys()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))


def made(kind, model):
    needs = NEEDS.get(f"koala.{kind}", Needs())
    return KINDS[kind](model if needs.module else model.parameters(), **REQUIRED.get(kind, {}))


def train(model, optimizer, steps, first=0):
    needs = NEEDS.get(f"koala.{type(optimizer).__name__}", Needs())
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        generator = torch.Generator(device="cpu").manual_seed(step)
        x = torch.randn(6, 1, 6, 6, generator=generator, device="cpu").to(dtype)
        y = torch.randint(3, (6,), generator=generator, device="cpu")
        torch.manual_seed(step)  # AdaHessian draws

        def closure(x=x, y=y):
            if needs.outputs:
                return model(x), y
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(create_graph=needs.create_graph)
            return loss

        optimizer.step(closure)


def assert_same_steps(one: tuple, two: tuple, steps: int, first: int) -> None:
    """Trains both pairs of network and optimizer, which must end at equal weights."""
    for model, optimizer in (one, two):
        train(model, optimizer, steps, first=first)
    assert torch.equal(weights(one[0]), weights(two[0]))


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@KIND
@pytest.mark.parametrize("through_file", [False, True])
def test_a_loaded_state_is_its_own(kind, through_file, tmp_path):
    """pytorch 196083: after load_state_dict in one process, the steps of one move the buffers of the other."""
    model = network()
    optimizer = made(kind, model)
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    loaded = made(kind, other)
    state = optimizer.state_dict()
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded.load_state_dict(state)
    assert_same_steps((model, optimizer), (other, loaded), steps=3, first=2)


@KIND
def test_a_copy_of_network_and_optimizer_takes_the_same_steps(kind):
    if kind in ("AdaFisher", "AdaFisherW", "KFAC"):
        pytest.skip("watches its own network through hooks, which a copy of the network shares")
    model = network()
    optimizer = made(kind, model)
    if "lr" in optimizer.defaults:
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps `step`
    train(model, optimizer, 2)
    other, its_own = copy.deepcopy((model, optimizer))
    assert_same_steps((model, optimizer), (other, its_own), steps=3, first=2)


@KIND
def test_a_hook_is_called_once_a_step(kind, monkeypatch):
    """torch wraps the step of a class when it is first made: a step that calls its parent's would call hooks twice."""
    for parent in KINDS[kind].__mro__[1:]:
        step = vars(parent).get("step")
        if step and parent.__name__ not in BASES and not hasattr(step, "hooked"):
            monkeypatch.setattr(parent, "step", Optimizer.profile_hook_step(step))  # as if one had been made
    calls, model = [], network()
    optimizer = made(kind, model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    assert calls == ["before", "after"]


@KIND
def test_inference_mode_leaves_no_trace(kind):
    model = network()
    optimizer = made(kind, model)
    other = network(seed=1)
    train(model, optimizer, 2)
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
        untouched = made(kind, other)
    train(model, optimizer, 1, first=2)
    train(other, untouched, 1)


@KIND
def test_another_default_device(kind):
    """A device that holds no data stands for an accelerator: what is made there by mistake cannot be computed with."""
    ends = []
    for device in ("cpu", "meta"):
        model = network()
        optimizer = made(kind, model)
        with torch.device(device):
            train(model, optimizer, 2)
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer, 1, first=2)
        ends.append(weights(model))
    assert torch.equal(*ends)


@FILTER
def test_a_layer_that_is_thawed_later_is_resumed(kind):
    """A script freezes, builds, thaws and saves; the same script, started again, loads before it thaws."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = made(kind, model)
    train(model, optimizer, 1)
    before = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    train(model, optimizer, 2, first=1)
    assert not torch.equal(model[0].weight, before)
    other = copy.deepcopy(model)
    other[0].requires_grad_(False)
    resumed = made(kind, other)
    resumed.load_state_dict(optimizer.state_dict())
    other[0].requires_grad_(True)
    assert_same_steps((model, optimizer), (other, resumed), steps=2, first=3)


@FILTER
def test_weights_are_cast_between_steps(kind):
    """xla 1623, plenoptic 404: `model.to(...)` after the optimizer was built leaves its state behind."""
    model = network()
    optimizer = made(kind, model)
    train(model, optimizer, 2)
    model.double()
    train(model, optimizer, 2, first=2)
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    assert all(value.dtype == torch.float64 for value in tensors)
    assert weights(model).isfinite().all()


@FILTER
def test_a_state_with_the_names_of_distributed_checkpoints(kind):
    """pytorch 143828: state that get_optimizer_state_dict names by parameter, not by number."""
    model = network()
    optimizer = made(kind, model)
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    loaded = made(kind, other)
    set_optimizer_state_dict(other, loaded, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert_same_steps((model, optimizer), (other, loaded), steps=2, first=2)


@FILTER
def test_a_parameter_is_put_in_place_of_another(kind):
    """HeavyBall 56, pytorch 42428: state_dict() raises KeyError where state is of a tensor that is in no group."""
    model = network()
    optimizer = made(kind, model)
    train(model, optimizer, 2)
    new = nn.Parameter(torch.randn(3, 8))
    params = optimizer.param_groups[0]["params"]
    params[[p is model[5].weight for p in params].index(True)] = model[5].weight = new
    assert len(optimizer.state_dict()["state"]) <= len(params)
    before = new.detach().clone()
    train(model, optimizer, 2, first=2)
    assert not torch.equal(new, before)
    other = copy.deepcopy(model)
    loaded = made(kind, other)
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_steps((model, optimizer), (other, loaded), steps=1, first=4)


@pytest.mark.parametrize("kind", [info.cls.__name__ for info in koala.list_optimizers() if info.observes != "outputs"])
@pytest.mark.parametrize("fused", [None, False])
def test_nothing_is_trained(kind, fused):
    """pytorch 100701, DeepSpeed 8467: parameters without an element; and a network that is frozen as a whole."""
    model = network()
    optimizer = KINDS[kind](model.parameters(), fused=fused)
    model.requires_grad_(False)
    before = weights(model)
    optimizer.step(loss=1.0)
    assert torch.equal(weights(model), before)
    empty = nn.Parameter(torch.zeros(0, 4))
    others = KINDS[kind]([empty], fused=fused)
    for _ in range(2):
        empty.grad = torch.zeros(0, 4)
        others.step(loss=1.0)
    for filtered in (optimizer, others):
        assert all(value.isfinite() for value in filtered.diagnostics().values())
