"""Schedule-free optimizers are evaluated at their average, and train on from where they were."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from koala import data
from koala.data.base import Batch
from koala.runs import compose
from koala.training.evaluation import Evaluation
from koala.training.machine import Arithmetic
from koala.training.ranks import Ranks

RUN = ["optim=schedule-free-sgd", "optim.lr=0.3", "schedule=constant", "data.weight_decay=0", "precision=fp64"]


def averages(runs, *overrides):
    """The weights of the last checkpoint's average x, from what it trains at, y = momentum x + (1 - momentum) z."""
    [checkpoint] = runs.checkpoints(*overrides)[-1:]
    state = torch.load(checkpoint, weights_only=True)
    momentum = state["optimizer"]["param_groups"][0]["momentum"]
    assert state["optimizer"]["param_groups"][0]["train_mode"]
    moved = [state["optimizer"]["state"][index]["z"] for index in range(len(state["model"]))]
    return {
        name: (y - (1 - momentum) * z) / momentum for (name, y), z in zip(state["model"].items(), moved, strict=True)
    }


def test_a_row_is_of_the_average_and_training_goes_on_from_its_own_weights(runs):
    record = runs.launch(*RUN)
    x = averages(runs, *RUN)
    cfg = runs.compose(*RUN)
    test = data.build(cfg.data, data.Loading(cfg.seed, 64, data_root=cfg.data_root)).evaluation["test"]
    total = count = 0
    for batch in test:
        hidden = batch.inputs.double().flatten(1)
        for layer in ("hidden0", "hidden1"):
            hidden = F.relu(F.linear(hidden, x[f"{layer}.weight"], x[f"{layer}.bias"]))
        logits = F.linear(hidden, x["head.weight"], x["head.bias"])
        total, count = total + F.cross_entropy(logits, batch.targets, reduction="sum").item(), count + len(logits)
    assert record["metrics"]["final"]["test_loss"] == pytest.approx(total / count, rel=1e-9)
    seldom = runs.launch(*RUN, "eval_every=2")
    assert seldom["metrics"]["final"]["test_loss"] == pytest.approx(total / count, rel=1e-9)


def test_batch_statistics_of_training_come_back_after_an_evaluation():
    net, cpu = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.device("cpu")
    batches = SimpleNamespace(epoch=lambda _: [Batch(torch.randn(8, 3) + 5, torch.zeros(8))])
    arithmetic = Arithmetic("fp32", cpu, torch.contiguous_format)
    evaluation = Evaluation(compose(["data=digits"]), Ranks(0, 1, cpu), arithmetic, SimpleNamespace(train=batches), net,
                            None, lambda: None)  # fmt: skip
    before = [buffer.clone() for buffer in net.buffers()]
    with evaluation.at_average(SimpleNamespace(eval=lambda: None, train=lambda: None)):
        assert not torch.equal(net[1].running_mean, before[0])
    assert all(map(torch.equal, net.buffers(), before))


def test_batch_statistics_are_made_anew_where_it_is_evaluated(runs):
    run = [*RUN, "optim.lr=1.0", "model=resnet10", "model.width=8", "max_steps=12", "precision=fp32"]
    assert runs.launch(*run)["metrics"]["final"]["test_loss"] < 2  # 1.3; with the statistics of training's weights 2.5
