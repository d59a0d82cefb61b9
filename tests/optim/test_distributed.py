"""DDP and FSDP2 against one process on the whole batch: float64, different data on every rank, agreement to 1e-10.

Four processes are spawned once. They are worlds of two, three and four ranks in turn, and each runs every optimizer;
rank 0 hands back what it saw as plain numbers.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import koala
from koala import LossStats
from tests.conftest import fork_ranks

from .cases import NAMES, VARIANTS

pytestmark = [
    pytest.mark.extended,
    pytest.mark.dist,
    pytest.mark.xdist_group(__name__),
]  # one pytest worker spawns them
STEPS, SAMPLES = 6, 12
CASES = {f"{name}-{i}": (name, {"lr": 0.3, **hyper}) for i, (name, hyper) in enumerate(VARIANTS)}
FUSED = {f"{name}-fused": (name, {"lr": 0.3, "weight_decay": 0.05, "fused": True}) for name in NAMES}
# What follows a step's sums is arithmetic of each rank alone: one way of splitting tensors sees every variant.
FEW = [*{name: case for case, (name, _) in CASES.items()}.values(), *FUSED]  # the last variant of each filter
FREEZING = {f"{name}-freezing": (name, {"lr": 0.3, "weight_decay": 0.05}) for name in NAMES}
# "hsdp" is two replicas of two shards: a norm counts each shard once. "tp" cuts matrices on two ranks that see one
# batch, beside tensors that both hold whole; "tp+fsdp" has parameters on a mesh over all ranks and on one over half.
WORLDS = {
    2: {"ddp": CASES | FUSED, "fsdp": CASES | FUSED | FREEZING, "tp": FEW, "offload": FEW},
    3: {"ddp": FEW, "fsdp": FEW},
    4: {"hsdp": FEW, "tp+fsdp": FEW},
}
CASES |= FUSED | FREEZING


class Net(nn.Module):
    """``gate`` leaves every rank but one an empty shard; ``extra`` is used by rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8).double()
        self.last = nn.Linear(8, 3).double()
        self.gate = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.extra = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))

    def forward(self, inputs, use_extra):
        logits = self.last(torch.tanh(self.first(inputs))) * self.gate
        return logits + use_extra * self.extra if use_extra is not None else logits


def data(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (SAMPLES,), generator=generator)


def single(case, parts):
    """The weights after every step in one process, and the filter's state."""
    name, hyper = CASES[case]
    model = Net()
    optimizer = koala.create_optimizer(name, model.parameters(), **hyper)
    used = torch.zeros(SAMPLES, 1, dtype=torch.float64)
    used[: SAMPLES // parts] = 1
    for step in range(STEPS):
        model.first.requires_grad_(not case.endswith("freezing") or step not in (2, 3))
        inputs, targets = data(step)

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(inputs, used), targets, reduction="none")
            losses.mean().backward()
            return losses

        optimizer.step(closure)
    return outcome(model, optimizer)


def outcome(model, optimizer):
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    weights = {f"weight {i}": p.detach().tolist() for i, p in enumerate(full)}
    scalars = {key: value.item() for key, value in optimizer.diagnostics().items() if key != "drift"}
    return weights | scalars


def wrap(strategy, world):
    """The model spread over ranks, and how many parts a batch is cut into."""
    model = Net()
    if strategy == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True), world
    if strategy.startswith("tp"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "last": RowwiseParallel()})
        if strategy == "tp":
            return model, 1
        return fully_shard(model, mesh=mesh["data"]), world // 2
    shape, names = ((2, world // 2), ("replicate", "shard")) if strategy == "hsdp" else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    policy = CPUOffloadPolicy(pin_memory=False) if strategy == "offload" else OffloadPolicy()
    fully_shard(model.first, mesh=mesh, offload_policy=policy)
    return fully_shard(model, mesh=mesh, offload_policy=policy), world


def parallel(case, strategy, rank, world):
    name, hyper = CASES[case]
    model, parts = wrap(strategy, world)
    optimizer = koala.create_optimizer(name, model.parameters(), **hyper)
    share, rank = SAMPLES // parts, rank * parts // world
    reductions = []
    for step in range(STEPS):
        getattr(model, "module", model).first.requires_grad_(not case.endswith("freezing") or step not in (2, 3))
        inputs, targets = (t[rank * share : (rank + 1) * share] for t in data(step))

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            if strategy == "ddp":
                use = torch.ones((), dtype=torch.float64) if rank == 0 else None
            else:
                use = torch.full((), float(rank == 0), dtype=torch.float64)
            losses = F.cross_entropy(model(inputs, use), targets, reduction="none")
            losses.mean().backward()
            for p in model.parameters():
                if isinstance(p, DTensor) and p.to_local().numel() == 0:
                    p.grad = None
            reductions[-1] = 0
            return losses

        reductions.append(0)
        with counting(reductions):
            optimizer.step(closure)
    return outcome(model, optimizer) | {"reductions": reductions}


class counting:
    """Counts the all-reduces made after the closure (those before are the strategy's own)."""

    def __init__(self, counts):
        self.counts = counts

    def __enter__(self):
        self.original = dist.all_reduce

        def counted(*args, **kwargs):
            self.counts[-1] += 1
            return self.original(*args, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_):
        dist.all_reduce = self.original


def worker(rank, rendezvous, results):
    torch.set_num_threads(1)
    for world, strategies in WORLDS.items():
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}{world}", rank=rank, world_size=world)
            seen = run(rank, world, strategies)
            if rank == 0:
                torch.save(seen, f"{results}{world}")
            dist.barrier()
            dist.destroy_process_group()
    os._exit(0)  # results are written; a thread of torch's was once destroyed unjoined while the interpreter went down


def run(rank, world, strategies):
    seen = {}
    for strategy, cases in strategies.items():
        for case in cases:
            result = parallel(case, strategy, rank, world)
            everyone = [None] * world
            dist.all_gather_object(everyone, result)
            assert all(other == result for other in everyone), f"ranks differ: {strategy} {case}"
            seen[strategy, case] = result
    stats = LossStats.from_losses(torch.arange(rank + 1.0)).all_reduce()
    return seen | {"stats": stats.sums.tolist()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each world saw."""
    folder = tmp_path_factory.mktemp("worlds")
    fork_ranks(worker, f"{folder}/rendezvous", f"{folder}/seen", world=max(WORLDS))
    return {world: torch.load(f"{folder}/seen{world}", weights_only=True) for world in WORLDS}


def check(seen, truth):
    reductions = seen.pop("reductions")
    assert seen.keys() == truth.keys()
    for key, expected in truth.items():
        result, truth_of_key = (torch.tensor(value, dtype=torch.float64) for value in (seen[key], expected))
        torch.testing.assert_close(result, truth_of_key, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    return reductions


@pytest.mark.parametrize(
    "world, strategy, case",
    [
        (world, strategy, case)
        for world, strategies in WORLDS.items()
        for strategy, cases in strategies.items()
        for case in cases
    ],
)
def test_equals_one_process_on_the_whole_batch(runs, world, strategy, case):
    """One reduction a step; none where replicas are stepped by what needs no loss."""
    parts = {"tp": 1, "tp+fsdp": world // 2}.get(strategy, world)
    reductions = check(dict(runs[world][strategy, case]), single(case, parts))
    needed = 0 if strategy == "ddp" and case.startswith(("sofim", "sgdf")) else 1
    assert reductions == [needed] * STEPS


@pytest.mark.parametrize("world", [2, 3])
def test_loss_stats_over_ranks(runs, world):
    losses = torch.cat([torch.arange(rank + 1.0) for rank in range(world)])
    expected = [losses.numel(), losses.sum().item(), losses.square().sum().item()]
    assert runs[world]["stats"] == expected
