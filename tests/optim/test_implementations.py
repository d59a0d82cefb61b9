"""The three implementations take the same steps, states included; none reads a device value; blocks bound memory."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import koala
from koala.optim import stages

from .cases import IDS, NAMES, VARIANTS, assert_same, batch, closure_for, make, net, snapshot, train


def trajectory(name, hyper, implementation, dtype=torch.float64, steps=8):
    model = net(dtype)
    optimizer = make(name, model, **hyper, implementation=implementation)
    train(model, optimizer, steps)
    return snapshot(model, optimizer)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_agree_over_eight_steps(name, hyper, implementation):
    truth = trajectory(name, hyper, "forloop")
    seen = trajectory(name, hyper, implementation)
    assert any(key.startswith("weights") for key in truth)
    assert_same(seen, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_agree_in_lower_precision(name, dtype, implementation):
    if implementation == "compiled" and dtype == torch.bfloat16 and name != "koala-m":
        pytest.skip("compiling takes seconds; one optimizer stands for all in bfloat16")
    hyper = {"weight_decay": 0.05, "lr": 0.05}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.15, "atol": 0.05}
    seen, truth = (trajectory(name, hyper, way, dtype, steps=7) for way in (implementation, "forloop"))
    weights = {key for key in truth if key.startswith("weights")}
    assert_same({k: seen[k] for k in weights}, {k: truth[k] for k in weights}, **tolerance)


def test_blocks_change_nothing(implementation, monkeypatch):
    blocked = trajectory("koala++", {"weight_decay": 0.05}, implementation)
    monkeypatch.setattr(stages, "BLOCK", 1 << 18)
    assert_same(trajectory("koala++", {"weight_decay": 0.05}, implementation), blocked, rtol=1e-9, atol=1e-11)


class NoHostReads(TorchDispatchMode):
    """Fails on what ``.item()``, ``float(tensor)``, ``if tensor`` and ``alpha=tensor`` come down to."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("way", ["forloop", "foreach", "fused"])
def test_a_step_reads_no_value(name, hyper, way):
    model = net()
    optimizer = make(name, model, **hyper, implementation=way)
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


@pytest.mark.parametrize("name", NAMES)
def test_nothing_recompiles_when_rate_or_step_change(name, monkeypatch):
    monkeypatch.setattr(stages, "COMPILE_FROM", 4)
    model = net()
    optimizer = make(name, model, implementation="compiled", weight_decay=0.01)
    train(model, optimizer, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2, 6):
            optimizer.param_groups[0]["lr"] *= 0.7
            optimizer.param_groups[0]["weight_decay"] *= 0.5
            train(model, optimizer, 1, first=step)
        train(*compiled_other(name), 2)  # another model: other lengths, same kernels


def compiled_other(name):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 5, 2), torch.nn.Flatten(), torch.nn.Linear(45, 3)).double()
    return model, make(name, model, implementation="compiled", weight_decay=0.01)


def test_without_a_compiler_the_compiled_way_says_so(monkeypatch):
    stages._compiled.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = torch.nn.Linear(300, 200)
    optimizer = koala.VanillaKOALA(model.parameters(), implementation="compiled")
    model(torch.ones(2, 300)).sum().backward()
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        optimizer.step(loss=1.0)


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


def test_the_for_loop_holds_less_than_twice_the_largest_tensor():
    path = Path(__file__).parents[2] / "scripts" / "benchmark_optimizers.py"
    spec = importlib.util.spec_from_file_location("benchmark_optimizers", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = torch.nn.Sequential(torch.nn.Linear(600, 500), torch.nn.Linear(500, 600), torch.nn.Linear(600, 500))
    largest = 4 * 600 * 500
    for name in NAMES:
        optimizer = make(name, model, implementation="forloop", weight_decay=0.01, lr=1e-3)
        for _ in range(2):
            model(torch.ones(2, 600)).sum().backward()
            optimizer.step(loss=1.0)
        peak = script.peak_extra_bytes(lambda o=optimizer: o.step(loss=1.0), torch.device("cpu"))
        assert 0 < peak <= 2 * largest, name
