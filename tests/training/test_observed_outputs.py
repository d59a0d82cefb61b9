"""Runs of optimizers that observe outputs: they train, without a rate to show, or are refused with what works."""

import pytest

from koala.training.tasks import Classification
from tests.refused import refused

SMALL = ["model.width=8", "max_steps=5", "batch_size=4"]


@pytest.mark.parametrize("name", ["diagonal-ekf", "lkf"])
def test_a_row_has_the_filter_and_no_rate(runs, name):
    record = runs.launch(f"optim={name}", *SMALL)
    (row,) = runs.history(f"optim={name}", *SMALL)
    assert record["status"] == "finished" and record["steps"] == 5
    assert "lr" not in row and row["filter_skipped"] == 0 and row["filter_nis"] > 0 and row["filter_p"] > 0


def test_a_sample_is_judged_before_it_is_learnt(runs, monkeypatch):
    """One epoch of single samples: the training error is the online error, of the weights before each step."""
    scored, score = [], Classification.score

    def noted(self, logits, targets):
        if len(targets) == 1:
            scored.append(int(logits.argmax(1) != targets))
        return score(self, logits, targets)

    monkeypatch.setattr(Classification, "score", noted)
    online = ["optim=diagonal-ekf", "model.width=8", "max_steps=40", "batch_size=1"]
    runs.launch(*online)
    (row,) = runs.history(*online)
    assert len(scored) == 40
    assert row["train_top1_error"] == pytest.approx(100 * sum(scored) / 40)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("schedule=cosine", "schedule"),
        ("wrapper=lookahead", "wrapper"),
        ("model=resnet10", "batch_size"),
        ("optim.r=-1.0", "optim"),
    ],
)
def test_what_leaves_it_no_room_is_refused(runs, override, key):
    with refused(key):
        runs.compose("optim=diagonal-ekf", override)
    with refused("optim.likelihood", "gaussian", "categorical"):
        runs.compose("optim=diagonal-ekf", "optim.likelihood=gaussian", "optim.r=1.0")


def test_text_is_refused_since_each_word_is_an_output(runs):
    with refused("optim", "lkf", "models of kind vision, text-classification"):
        runs.compose("optim=lkf", "data=pydocs", "model=tiny-lstm", "grad_clip=null")
