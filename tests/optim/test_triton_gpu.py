"""What only a GPU can show of the Triton kernels: that many programs at once agree, and that the host only launches."""

import pytest
import torch
from torch.nn import functional as F

import koala
from koala import LossStats

from .cases import IDS, NAMES, VARIANTS, assert_same, batch, make, net, snapshot

pytestmark = pytest.mark.gpu


def step(model, optimizer, index):
    """One step, with nothing but device tensors handed over."""
    p = next(model.parameters())
    images, targets = (t.to(p.device) for t in batch(index, dtype=p.dtype))
    optimizer.predict()
    optimizer.zero_grad()
    losses = F.cross_entropy(model(images), targets, reduction="none")
    losses.mean().backward()
    optimizer.update(LossStats.from_losses(losses))


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=IDS)
def test_takes_the_portable_steps_on_either_device(name, hyper):
    snapshots = []
    for device, fused, backend in (("cpu", False, "portable"), ("cuda", False, "portable"), ("cuda", None, "triton")):
        model = net().to(device)
        optimizer = make(name, model, **hyper, fused=fused)
        assert optimizer.backend == backend
        for index in range(8):
            step(model, optimizer, index)
        snapshots.append({key: value.cpu() for key, value in snapshot(model, optimizer).items()})
    cpu, portable, triton = snapshots
    assert_same(portable, cpu, rtol=1e-8, atol=1e-9)
    assert_same(triton, portable, rtol=1e-9, atol=1e-11)


def large(dtype=torch.float32):
    """Tensors of many chunks, of odd lengths, at odd addresses, and hundreds of small ones."""
    torch.manual_seed(0)
    memory = torch.randn(30_000_001, dtype=dtype, device="cuda")
    lengths = [1, 5_000_000, 12_345_677, 3, 999_999, *[257] * 300]
    return [torch.nn.Parameter(piece) for piece in memory[: sum(lengths)].split(lengths)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_large_tensors_agree_and_repeat_to_the_bit(name, dtype):
    results = []
    for fused in (False, None, None):
        params = large(dtype)
        optimizer = make(name, params, lr=0.1, weight_decay=1e-2, fused=fused)
        for index in range(3):
            optimizer.predict()
            for i, p in enumerate(params):
                p.grad = torch.sin(p.detach().float() * (index + 1) + i).to(dtype)
            optimizer.update(1.0)
        results.append([p.detach() for p in params])
    portable, once, again = results
    for a, b, c in zip(portable, once, again, strict=True):
        assert torch.equal(b, c)
        tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(b, a, **tolerance)


def prepared(name, tensors=400, lr=0.1):
    params = [torch.nn.Parameter(torch.randn(256, device="cuda")) for _ in range(tensors)]
    rate = torch.tensor(lr, dtype=torch.float64, device="cuda")
    optimizer = koala.create_optimizer(name, params, lr=rate, weight_decay=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    stats = LossStats(torch.tensor([8.0, 12.0, 20.0], dtype=torch.float64, device="cuda"))
    for _ in range(3):
        optimizer.predict()
        optimizer.update(stats)
    return params, optimizer, stats


@pytest.mark.parametrize("name", NAMES)
def test_a_step_neither_waits_nor_allocates(name):
    _, optimizer, stats = prepared(name)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.predict()
        optimizer.update(stats)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("name", NAMES)
def test_four_launches_and_no_copy_from_the_host(name):
    _, optimizer, stats = prepared(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.predict()
        optimizer.update(stats)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    assert not [name for name in names if "HtoD" in name]
    assert len(kernels) <= 4, kernels


@pytest.mark.parametrize("moved", [False, True], ids=["same gradients", "moved gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_the_eager_steps(name, moved):
    """Gradients may move to the graph's own memory when it is captured; their addresses go with the graph."""
    torch.manual_seed(0)
    eager_params, eager, stats = prepared(name)
    torch.manual_seed(0)
    params, optimizer, local = prepared(name)

    def run(params, optimizer, stats):
        optimizer.predict()
        for i, p in enumerate(params):
            p.grad.copy_(torch.sin(p.detach() + i))
        optimizer.update(stats)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if moved:
        for p in params:
            p.grad = None
    with torch.cuda.graph(graph):
        if moved:
            for p in params:
                p.grad = torch.zeros_like(p)
        run(params, optimizer, local)
    for index in range(4):
        rate = 0.1 / (1 + index)
        for group in (*eager.param_groups, *optimizer.param_groups):
            group["lr"].fill_(rate)
        stats.sums[1] = local.sums[1] = 12.0 + index
        run(eager_params, eager, stats)
        graph.replay()
        if index == 1:  # an eager step between replays does not change what the graph does
            run(eager_params, eager, stats)
            for p in params:
                p.grad = torch.empty_like(p)
            run(params, optimizer, local)
    for a, b in zip(params, eager_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_half_the_model_in_another_dtype_and_decay():
    def groups():
        torch.manual_seed(0)
        half = torch.nn.Linear(300, 200, device="cuda", dtype=torch.bfloat16)
        full = torch.nn.Linear(300, 200, device="cuda")
        return [{"params": half.parameters()}, {"params": full.parameters(), "weight_decay": 0.0, "lr": 0.3}]

    for name in NAMES:
        results = []
        for fused in (False, None):
            optimizer = koala.create_optimizer(name, groups(), lr=0.1, weight_decay=0.01, fused=fused)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for index in range(4):
                optimizer.predict()
                for p in params:
                    p.grad = torch.cos(p.detach() + index)
                optimizer.update(2.0, 5.0)
            results.append(params)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
