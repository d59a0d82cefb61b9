"""Statistics over two ranks, spawned once: what each rank saw, averaged; and what cannot be averaged is refused."""

import pytest
import torch
import torch.distributed as dist

from koala.baselines.adafisher import AdaFisher
from koala.baselines.ranks import average
from tests.conftest import fork_ranks

from .networks import batch, closure_for, make

pytestmark = [pytest.mark.extended, pytest.mark.dist]
PARTS = (slice(0, 2), slice(2, 6))  # of different sizes


def statistics(optimizer):
    return [optimizer.state[layer.owner][name] for layer in optimizer._layers for name in ("H", "S")]


def one_step(kind, part, **settings):
    model = make()
    optimizer = kind(model, **settings)
    images, targets = batch(0)
    optimizer.step(closure_for(model, optimizer, images[part], targets[part]))
    return optimizer


def on_a_rank(rank, folder):
    from koala.baselines.kfac import KFAC

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tensor = torch.tensor([1.0, 4.0])[rank : rank + 1].clone()
    average([tensor], weight=[1.0, 3.0][rank])
    fisher = one_step(AdaFisher, PARTS[rank], loss_scale=1e3)
    kfac = one_step(KFAC, PARTS[rank])
    inverses = [kfac.state[weight][name] for weight, _ in kfac.layers for name in ("A_inverse", "B_inverse")]
    torch.save({"mean": tensor, "HS": statistics(fisher), "inverses": inverses}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_the_average_of_what_they_saw(tmp_path):
    pytest.importorskip("koala.baselines.kfac", exc_type=ImportError)
    fork_ranks(on_a_rank, str(tmp_path), world=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    halves = [statistics(one_step(AdaFisher, part, loss_scale=1e3)) for part in PARTS]
    for index, result in enumerate(ranks[0]["HS"]):
        torch.testing.assert_close(result, (halves[0][index] + halves[1][index]) / 2)
    for one, two in zip(ranks[0]["HS"] + ranks[0]["inverses"], ranks[1]["HS"] + ranks[1]["inverses"], strict=True):
        assert torch.equal(one, two)
    assert ranks[0]["mean"].item() == ranks[1]["mean"].item() == 13 / 4
