"""Tallies against LossStats and plain sums."""

import torch

from koala import metrics
from koala.optim import LossStats
from koala.runs import compose
from koala.training.tally import Tally
from koala.training.tasks import build_task


def test_tallies_of_parts_add_up_to_that_of_all_samples_and_begin_as_loss_stats():
    losses, wrong = torch.rand(7), torch.tensor([1, 0, 1, 1, 0, 0, 1])
    parts = [Tally.of(losses[a:b], top1_error=wrong[a:b].sum()) for a, b in ((0, 3), (3, 7))]
    tally = parts[0] + parts[1]
    torch.testing.assert_close(tally.losses.sums, LossStats.from_losses(losses).sums)
    assert tally["top1_error"] == 4
    torch.testing.assert_close((tally - parts[0]).sums, parts[1].sums)
    assert torch.equal((Tally.zero(tally.names, losses.device) + tally).sums, tally.sums)


def test_a_sample_that_is_not_scored_is_not_counted():
    tally = Tally.of(torch.tensor([2.0, 0.0, 4.0]), torch.tensor(2))
    assert tally.losses.mean == 3 and tally.losses.second_moment == 10


def test_summaries_are_means_percentages_and_perplexities():
    images = build_task(compose(["data=digits", "model=mlp"]), 10)
    tally = Tally.of(torch.tensor([1.0, 3.0, 2.0, 2.0]), top1_error=torch.tensor(3), top5_error=torch.tensor(1))
    assert images.summary(tally) == {"loss": 2.0, "top1_error": 75.0, "top5_error": 25.0}
    text = build_task(compose(["data=pydocs", "model=tiny-lstm"]), 10)
    summary = text.summary(Tally.of(torch.tensor([1e4, 1e4])))
    assert summary == {"loss": 1e4, "ppl": float("inf")}
    assert metrics.perplexity(0.0) == 1.0
