"""Two gloo ranks: what a rank passes is what that rank saw; all step or none; what cannot be right is refused."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import koala
from koala import LossStats
from tests.conftest import fork_ranks

from .cases import NAMES

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group(__name__)]  # one pytest worker spawns the ranks
STEPS, SAMPLES = 5, 12
TELLS = ("observe", "update", "step", "stats", "closure")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def data(step, own=slice(None)):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return inputs[own], torch.randint(4, (SAMPLES,), generator=generator)[own]


def train(model, optimizer, tell, own=slice(None), steps=STEPS):
    """README's loops, each of which tells the optimizer this rank's losses in its way."""
    for step in range(steps):
        inputs, targets = data(step, own)

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            (optimizer.observe(losses) if tell == "observe" else losses.mean()).backward()
            return losses

        if tell == "closure":
            optimizer.step(closure)
            continue
        optimizer.predict()
        losses = closure()
        if tell == "observe":
            optimizer.update()
        elif tell == "update":
            optimizer.update(losses.mean(), losses.square().mean())
        elif tell == "step":
            optimizer.step(loss=losses.mean(), loss_var=losses.square().mean())
        else:
            optimizer.update(LossStats.from_losses(losses))
    weights = torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]])
    return weights.tolist() + [value.item() for value in optimizer.diagnostics().values()]


def refused(build):
    try:
        optimizer, model = build()
        train(model, optimizer, "closure", steps=1)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return "not refused"


def flat_shards():
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=False)
    return koala.VanillaKOALA(model.parameters()), model


def flat_shards_by_name():
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    return koala.VanillaKOALA(model.parameters()), model


def zero_redundancy():
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double())
    return ZeroRedundancyOptimizer(model.parameters(), koala.VanillaKOALA, lr=0.5), model


def pipeline():
    """Two stages of the same shapes, one on each rank."""
    model = network(seed=dist.get_rank())
    return koala.VanillaKOALA(model.parameters()), model


GIVES_UP = ("closure", "bare", "first step", "empty")


def with_a_rank_that_gives_up(name, way, rank):
    """Replicas on one batch; in one step rank 1 has no gradient and no loss, or a batch without samples."""
    model = network()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    for step in range(4):
        odd = rank == 1 and step == (0 if way == "first step" else 2)
        inputs, targets = data(step, slice(0 if odd and way == "empty" else SAMPLES))

        def closure(inputs=inputs, targets=targets, odd=odd):
            optimizer.zero_grad()
            if odd and way != "empty":
                return None
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            losses.sum().backward()
            if way != "bare":
                return losses
            return optimizer.observe(losses.detach())

        if way == "bare":
            optimizer.predict()
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return {"weights": weights, **{key: value.item() for key, value in optimizer.diagnostics().items()}}


def worker(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    own = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    seen = {}
    for name in NAMES:
        for tell in TELLS:
            model = DistributedDataParallel(network())
            seen[name, tell] = train(model, koala.create_optimizer(name, model.parameters(), lr=0.3), tell, own)
        for way, group in (("False", False), ("own group", alone)):
            if rank == 0 or way == "own group":  # with False one rank alone may step
                model = network(seed=rank)
                optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3, process_group=group)
                seen[name, way] = train(model, optimizer, "update", own)
        for way in GIVES_UP:
            seen[name, "gives up", way] = with_a_rank_that_gives_up(name, way, rank)
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = koala.VanillaKOALA([p], alpha_r=0.0)
    p.grad = torch.ones_like(p)
    optimizer.update(LossStats.from_losses(torch.full((1 + 2 * rank,), 1.0 + rank)))  # one loss of 1, three of 2
    seen["R"] = optimizer.diagnostics()["R"].item()
    for build in (flat_shards, flat_shards_by_name, zero_redundancy, pipeline):
        seen[build.__name__] = refused(build)
    torch.save(seen, f"{results}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in test_distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    fork_ranks(worker, str(folder / "rendezvous"), str(folder / "seen"), world=2)
    return [torch.load(folder / f"seen.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tell", TELLS)
def test_the_loops_of_the_readme(ranks, name, tell):
    """Losses of a rank in, the same bits on both, and those of one process to 1e-10."""
    assert ranks[0][name, tell] == ranks[1][name, tell]
    model = network()
    truth = train(model, koala.create_optimizer(name, model.parameters(), lr=0.3), tell)
    assert ranks[0][name, tell] == pytest.approx(truth, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_process_group_says_who_takes_part(ranks, name):
    for rank in range(2):
        model = network(seed=rank)
        optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
        own = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
        truth = train(model, optimizer, "update", own)
        assert ranks[rank][name, "own group"] == truth
        assert rank == 1 or ranks[rank][name, "False"] == truth


def test_losses_are_weighted_by_their_counts(ranks):
    assert [seen["R"] for seen in ranks] == [pytest.approx((1 + 3 * 4) / 4)] * 2


@pytest.mark.parametrize("build", [flat_shards, flat_shards_by_name])
def test_flat_shards_are_refused(ranks, build):
    for seen in ranks:
        assert "FSDP1" in seen[build.__name__] and "FSDP2 (fully_shard)" in seen[build.__name__]


@pytest.mark.parametrize("build", [zero_redundancy, pipeline])
def test_ranks_that_train_different_tensors_are_refused(ranks, build):
    for seen in ranks:
        assert "do not train the same tensors" in seen[build.__name__] and "process_group=False" in seen[build.__name__]


@pytest.mark.parametrize("way", [way for way in GIVES_UP if way != "empty"])
@pytest.mark.parametrize("name", [info.name for info in koala.list_optimizers() if info.observes == "loss"])
def test_all_ranks_step_or_none(ranks, name, way):
    """Where one gives up its batch, both end where one process does that skips the step."""
    assert ranks[0][name, "gives up", way] == ranks[1][name, "gives up", way]
    model = network()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    for step in range(4):
        inputs, targets = data(step)
        optimizer.zero_grad()
        optimizer.predict()
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        losses.sum().backward()
        gives_up = step == (0 if way == "first step" else 2)
        optimizer.update(float("nan") if gives_up else LossStats.from_losses(losses))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    assert ranks[0][name, "gives up", way]["weights"] == pytest.approx(weights, rel=1e-10)
    assert ranks[0][name, "gives up", way]["skipped"] == 1


@pytest.mark.parametrize("way", GIVES_UP)
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_a_batch_keeps_the_filter_together(ranks, name, way):
    """SOFIM and SGDF talk to nobody where weights are replicas: what averages gradients keeps those together."""
    one, other = (dict(seen[name, "gives up", way]) for seen in ranks)
    if way == "empty" or name in ("sofim", "sgdf"):
        assert torch.tensor(other.pop("weights")).isfinite().all() and one.pop("weights")
    one.pop("gain", None), other.pop("gain", None)
    if name in ("sofim", "sgdf"):
        assert one == other
