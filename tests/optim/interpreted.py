"""The Triton kernels on tensors of the CPU, in Triton's interpreter: test_triton.py runs this file, in a process where
TRITON_INTERPRET=1 and `fused=True` therefore means Triton."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

import koala
from koala.optim import fused_cuda

from . import test_distributed as distributed
from .cases import IDS, NAMES, VARIANTS, assert_same, make, net, reference_snapshot, snapshot, train
from .test_implementations import trajectory


def watch(patch):
    """The names of the kernels that are launched from now on.

    Also, the interpreter patches Triton's language anew at every call of a device function, which is half of its time:
    from now on once for each function and launch.
    """
    seen, patched, run = [], set(), InterpretedFunction.run

    def launch(self, *args, **kwargs):
        seen.append(self.__name__)
        patched.clear()
        return run(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    patch.setattr(InterpretedFunction, "run", launch)
    patch.setattr(InterpretedFunction, "__call__", call)
    return seen


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a test has what is no number


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    return watch(monkeypatch)


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_follows_the_reference(name, hyper):
    assert make(name, net(), **hyper, fused=True).backend == "triton"
    truth, seen = reference_snapshot(name, hyper, 4), trajectory(name, hyper, fused=True, steps=4)
    assert_same({key: seen[key] for key in truth}, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_follows_the_reference_in_lower_precision(name, dtype):
    hyper = {"weight_decay": 0.05, "lr": 0.05}
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.02}
    truth, seen = reference_snapshot(name, hyper, 4), trajectory(name, hyper, True, dtype, steps=4)
    assert_same({key: seen[key].double() for key in truth}, truth, **tolerance)


def strides(fused, name):
    """Two groups of every layout there is: rows by columns, channels last, every other element, a gradient unlike its
    weight; of two dtypes."""
    torch.manual_seed(1)
    last = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    float64 = torch.randn(3, 5, dtype=torch.float64)
    weights = [torch.randn(7, 5).t(), last, torch.randn(12)[::2], float64, torch.randn(()), torch.randn(0, 2)]
    weights.append(torch.tensor([1.0, torch.inf]))
    params = [torch.nn.Parameter(t) for t in weights]
    groups = [{"params": params[:3] + params[6:], "lr": 0.3}, {"params": params[3:6], "weight_decay": 0.0}]
    return params, make(name, groups, lr=0.1, weight_decay=0.02, fused=fused)


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    if step == 2:
        params[0].grad = None
        params[1].grad.zero_()
        params[3].grad[0] = torch.nan
    if step == 3:
        params[2].grad.mul_(1e-11)
        params[4].grad.fill_(torch.inf)


@pytest.mark.parametrize("name", NAMES)
def test_any_layout_and_any_gradient(name):
    """Missing, vanishing and infinite gradients, and a loss that is no number, at the fourth step."""
    results = []
    for fused in (False, True):
        params, optimizer = strides(fused, name)
        for step in range(6):
            optimizer.predict()
            gradients(params, step)
            optimizer.update(float("nan") if step == 3 else 1.5 + step, 4.0)
        results.append({str(i): p.detach().clone() for i, p in enumerate(params)} | optimizer.diagnostics())
    assert_same(results[1], results[0], rtol=2e-5, atol=1e-6)


def test_a_rate_that_is_a_tensor_and_hyper_parameters_that_change():
    one, other = net(), net()
    portable_, fused = make("koala-m", one, fused=False), make("koala-m", other, fused=True)
    fused.param_groups[0]["lr"] = torch.tensor(1.0, dtype=torch.float64)
    for step, rate in enumerate((1.0, 0.5, 0.25)):
        portable_.param_groups[0]["lr"] = rate
        fused.param_groups[0]["lr"].fill_(rate)
        for optimizer in (portable_, fused):
            optimizer.param_groups[0].update(a=0.9 - 0.2 * step, weight_decay=0.01 * step)
        train(one, portable_, 1, first=step)
        train(other, fused, 1, first=step)
    assert_same(snapshot(other, fused), snapshot(one, portable_), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_four_launches_whatever_the_number_of_tensors(name, launches):
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(12)]
    optimizer = koala.create_optimizer(name, params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        launches.clear()
        optimizer.predict()
        optimizer.update(1.0)
        assert len(launches) <= 4 and launches[-1].startswith("apply")


@pytest.mark.parametrize("name", NAMES)
def test_gains_are_the_filters_own(name, monkeypatch):
    """On random rows of more tensors than a tile holds, some of which are no numbers, or too small to count."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(700)]
    groups = [{"params": params[:300], "lr": 0.3}, {"params": params[300:], "weight_decay": 0.0}]
    optimizer = koala.create_optimizer(name, groups, lr=0.1, weight_decay=0.02, fused=True)
    sums = torch.tensor([8.0, 12.0, 25.0], dtype=torch.float64)
    expected, seen = [], []

    def measure(optimizer, layout):
        rows = torch.rand(1 + len(optimizer.products), layout.n, dtype=torch.float64, generator=generator)
        rows[0] = rows[0] > 0.1
        rows[1, ::7] = 1e-30
        rows[-1, 5], rows[1, 600] = torch.inf, torch.nan
        before = layout.scalars.clone(), layout.filter.clone()
        lr, decay = layout.hyper[:, layout.group]
        expected.append(optimizer.gains(rows, lr, decay, *before, sums if optimizer.needs_loss else None))
        return rows

    class Passes:
        def __init__(self, coefficients):
            self.coefficients = coefficients

        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(args[self.coefficients])

    monkeypatch.setattr(fused_cuda, "measure", measure)
    kernels = fused_cuda.kernels_of(optimizer.kernel)
    for module, kernel, coefficients in (
        (kernels, "predict", 0),
        (kernels, "apply", 2),
        (fused_cuda.passes, "apply", 4),
    ):
        if hasattr(module, kernel):
            monkeypatch.setattr(module, kernel, Passes(coefficients))
    for p in params:
        p.grad = torch.ones(1)
    for _ in range(2):
        optimizer.update(koala.LossStats(sums))
        coefficients, scalars, state = expected[-1]
        gate = coefficients[0] > 0
        assert 0 < gate.sum() < 700
        assert_same(dict(enumerate(seen[-1][:, gate])), dict(enumerate(coefficients[:, gate])), rtol=1e-12, atol=1e-15)
        assert torch.equal(seen[-1][0], coefficients[0])
        for row, scalar in enumerate(optimizer.scalars):
            result = torch.stack([optimizer.state[p][scalar] for p in params])
            torch.testing.assert_close(result, scalars[row], rtol=1e-12, atol=1e-15)
        result = torch.stack([optimizer.param_groups[0][key] for key in optimizer.filter_state])
        torch.testing.assert_close(result, state, rtol=1e-12, atol=1e-15)


def test_tensors_of_many_chunks_at_odd_addresses(monkeypatch):
    """Sums of chunks, of whole tiles and of ends of tiles, of tensors that begin anywhere."""
    monkeypatch.setattr(fused_cuda, "SHORTEST", 1024)
    monkeypatch.setattr(fused_cuda, "PROGRAMS", 4)
    torch.manual_seed(0)
    memory = torch.randn(10_000)
    params = [torch.nn.Parameter(t) for t in memory.split([4096, 1, 5000, 903])]  # the last two are not aligned
    doubles = [torch.nn.Parameter(p.detach().double()) for p in params]
    truth = make("koala++", doubles, weight_decay=0.1, fused="reference")
    optimizer = koala.KOALAPlusPlus(params, weight_decay=0.1, fused=True)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            doubles[i].grad = p.grad.double()
        truth.update(1.0 + step)
        optimizer.update(1.0 + step)
    for p, x in zip(params, doubles, strict=True):
        torch.testing.assert_close(p.double(), x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["S"], truth.state[x]["S"], rtol=1e-6, atol=0)


def sharded(rank, rendezvous, path):
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(distributed, "STEPS", 3)
    watch(patch)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    result = distributed.parallel("koala-m-fused", "fsdp", rank, 2)
    if rank == 0:
        torch.save(result, path)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in test_distributed.py


def test_shards_are_one_tensor(tmp_path, monkeypatch):
    """The one reduction of a step is between measure and gains: two ranks end where one process does."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where the ranks find this module
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(distributed, "STEPS", 3)
    mp.spawn(sharded, args=(str(tmp_path / "rendezvous"), str(tmp_path / "result.pt")), nprocs=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert set(distributed.check(result, distributed.single("koala-m-fused", 2))) == {1}
