"""Two gloo ranks: what a rank passes is what that rank saw; all step or none; what cannot be right is refused."""

import os
from functools import partial

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
STYLES = ("observe", "update", "step", "stats", "closure")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def data(step, part=slice(None)):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return inputs[part], torch.randint(4, (SAMPLES,), generator=generator)[part]


def train(model, optimizer, style, part=slice(None), steps=STEPS):
    """README's loops, each of which hands this rank's losses over in its style."""
    for step in range(steps):
        inputs, targets = data(step, part)

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            (optimizer.observe(losses) if style == "observe" else losses.mean()).backward()
            return losses

        if style == "closure":
            optimizer.step(closure)
            continue
        optimizer.predict()
        losses = closure()
        if style == "observe":
            optimizer.update()
        elif style == "update":
            optimizer.update(losses.mean(), losses.square().mean())
        elif style == "step":
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
        return type(error).__name__, str(error)


def flat_shards(by_name=False):
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=by_name)
    return koala.VanillaKOALA(model.parameters()), model


def zero_redundancy():
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double())
    return ZeroRedundancyOptimizer(model.parameters(), koala.VanillaKOALA, lr=0.5), model


def pipeline():
    """Two stages of the same shapes, one on each rank."""
    model = network(seed=dist.get_rank())
    return koala.VanillaKOALA(model.parameters()), model


REFUSED = {
    "flat shards": (flat_shards, "NotImplementedError", "fully_shard"),
    "flat shards by name": (partial(flat_shards, by_name=True), "NotImplementedError", "fully_shard"),
    "zero redundancy": (zero_redundancy, "RuntimeError", "process_group=False"),
    "pipeline": (pipeline, "RuntimeError", "process_group=False"),
}
GIVES_UP = ("closure", "bare", "first step", "empty")


def with_a_rank_that_gives_up(name, case, rank):
    """Replicas on one batch; in one step rank 1 has no gradient and no loss, or a batch without samples."""
    model = network()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    for step in range(4):
        odd = rank == 1 and step == (0 if case == "first step" else 2)
        inputs, targets = data(step, slice(0 if odd and case == "empty" else SAMPLES))

        def closure(inputs=inputs, targets=targets, odd=odd):
            optimizer.zero_grad()
            if odd and case != "empty":
                return None
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            losses.sum().backward()
            if case != "bare":
                return losses
            return optimizer.observe(losses.detach())

        if case == "bare":
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
    part = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    seen = {}
    for name in NAMES:
        for style in STYLES:
            model = DistributedDataParallel(network())
            seen[name, style] = train(model, koala.create_optimizer(name, model.parameters(), lr=0.3), style, part)
        for case, group in (("False", False), ("own group", alone)):
            if rank == 0 or case == "own group":  # with False one rank alone may step
                model = network(seed=rank)
                optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3, process_group=group)
                seen[name, case] = train(model, optimizer, "update", part)
        for case in GIVES_UP:
            seen[name, "gives up", case] = with_a_rank_that_gives_up(name, case, rank)
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = koala.VanillaKOALA([p], alpha_r=0.0)
    p.grad = torch.ones_like(p)
    optimizer.update(LossStats.from_losses(torch.full((1 + 2 * rank,), 1.0 + rank)))  # one loss of 1, three of 2
    seen["R"] = optimizer.diagnostics()["R"].item()
    for case, (build, *_) in REFUSED.items():
        seen[case] = refused(build)
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
@pytest.mark.parametrize("style", STYLES)
def test_the_loops_of_the_readme(ranks, name, style):
    """Losses of a rank in, the same bits on both, and those of one process to 1e-10."""
    assert ranks[0][name, style] == ranks[1][name, style]
    model = network()
    truth = train(model, koala.create_optimizer(name, model.parameters(), lr=0.3), style)
    assert ranks[0][name, style] == pytest.approx(truth, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_process_group_says_who_takes_part(ranks, name):
    for rank in range(2):
        model = network(seed=rank)
        optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
        part = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
        truth = train(model, optimizer, "update", part)
        assert ranks[rank][name, "own group"] == truth
        assert rank == 1 or ranks[rank][name, "False"] == truth


def test_losses_are_weighted_by_their_counts(ranks):
    assert [seen["R"] for seen in ranks] == [pytest.approx((1 + 3 * 4) / 4)] * 2


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(ranks, case):
    """Flat shards, and ranks that train different tensors: on every rank, with what works instead."""
    _, kind, works = REFUSED[case]
    for seen in ranks:
        assert seen[case][0] == kind and works in seen[case][1]


@pytest.mark.parametrize("case", [case for case in GIVES_UP if case != "empty"])
@pytest.mark.parametrize("name", [info.name for info in koala.list_optimizers() if info.observes == "loss"])
def test_all_ranks_step_or_none(ranks, name, case):
    """Where one gives up its batch, both end where one process does that skips the step."""
    assert ranks[0][name, "gives up", case] == ranks[1][name, "gives up", case]
    model = network()
    optimizer = koala.create_optimizer(name, model.parameters(), lr=0.3)
    for step in range(4):
        inputs, targets = data(step)
        optimizer.zero_grad()
        optimizer.predict()
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        losses.sum().backward()
        gives_up = step == (0 if case == "first step" else 2)
        optimizer.update(float("nan") if gives_up else LossStats.from_losses(losses))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    assert ranks[0][name, "gives up", case]["weights"] == pytest.approx(weights, rel=1e-10)
    assert ranks[0][name, "gives up", case]["skipped"] == 1


@pytest.mark.parametrize("case", GIVES_UP)
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_a_batch_keeps_the_filter_together(ranks, name, case):
    """SOFIM and SGDF talk to nobody where weights are replicas: what averages gradients keeps those together."""
    one, other = (dict(seen[name, "gives up", case]) for seen in ranks)
    if case == "empty" or name in ("sofim", "sgdf"):
        assert torch.tensor(other.pop("weights")).isfinite().all() and one.pop("weights")
    one.pop("gain", None), other.pop("gain", None)
    if name in ("sofim", "sgdf"):
        assert one == other
