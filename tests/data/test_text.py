"""Text batches: truncated back-propagation through the stream, and evaluation of every token once."""

import math

import pytest
import torch

from koala.data import Loading, build
from koala.data.spec import TextSpec
from koala.data.text import IGNORED, EvalColumns, TrainColumns
from tests.refused import refused

STREAM = torch.arange(100, 1100)  # token t stands at position t - 100


@pytest.fixture
def folder(write_text):
    return write_text("a b c\nb a\n" * 50, "a b\n", "c a\n")


def built(folder, *, batch_size=4, eval_batch_size=10, rank=0, world=1, **cfg):
    cfg = {"name": "mine", "kind": "text", "path": str(folder), **cfg}
    return build(cfg, Loading(0, batch_size, eval_batch_size, rank, world, data_root=folder / "cache"))


def spec(**keys):
    return TextSpec(name="mine", kind="text", **keys)


def pairs(batches):
    """{target: the token before it} of all that is scored, each once."""
    result = {}
    for batch in batches:
        scored = batch.targets != IGNORED
        for target, before in zip(batch.targets[scored].tolist(), batch.inputs[scored].tolist(), strict=True):
            assert target not in result
            result[target] = before
    return result


@pytest.mark.parametrize("columns, bptt", [(1, 7), (4, 35), (20, 10), (499, 5), (500, 35)])
def test_training_reads_every_column_in_order(columns, bptt):
    source = TrainColumns(STREAM, spec(bptt=bptt), Loading(0, columns))
    batches = list(source.epoch(0))
    length = len(STREAM) // columns
    inputs = torch.cat([batch.inputs for batch in batches], dim=1)
    targets = torch.cat([batch.targets for batch in batches], dim=1)
    assert len(batches) == source.steps_per_epoch == math.ceil((length - 1) / bptt)
    assert torch.equal(inputs.flatten()[: length - 1], STREAM[: length - 1])
    assert torch.equal(inputs[:, 0], STREAM[: columns * length : length])
    assert torch.equal(targets, inputs + 1)
    assert [batch.start for batch in batches] == [True] + [False] * (len(batches) - 1)
    sizes = [batch.targets.numel() for batch in batches]
    assert [source.samples(step) for step in range(len(batches))] == sizes


def test_a_resumed_epoch_is_the_rest_of_it():
    source = TrainColumns(STREAM, spec(bptt=35), Loading(0, 4))
    rest, full = list(source.epoch(3, start=5)), list(source.epoch(3))[5:]
    assert len(rest) == len(full) > 0
    for left, right in zip(rest, full, strict=True):
        assert torch.equal(left.inputs, right.inputs) and left.start == right.start


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_read_the_columns_of_the_same_batch(folder, world):
    full = built(folder, batch_size=7, bptt=5)
    ranks = [built(folder, batch_size=7, bptt=5, rank=rank, world=world) for rank in range(world)]
    for single, *parts in zip(full.train.epoch(0), *[data.train.epoch(0) for data in ranks], strict=True):
        assert torch.equal(torch.cat([part.inputs for part in parts]), single.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), single.targets)
    assert ranks[0].train.samples_per_step == full.train.samples_per_step == 7 * 5


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 99, 1000])
@pytest.mark.parametrize("batch, world", [(1, 1), (3, 1), (10, 1), (500, 1), (1, 2), (4, 3), (10, 12)])
def test_evaluation_scores_every_token_once_after_the_one_before_it(tokens, batch, world):
    eos, stream = 1, STREAM[:tokens]
    ranks = [list(EvalColumns(stream, eos, spec(bptt=6), Loading(0, 1, batch, rank, world))) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(one.inputs.shape == one.targets.shape and len(one.inputs) <= batch for part in ranks for one in part)
    assert pairs(one for part in ranks for one in part) == {
        token: token - 1 if token > 100 else eos for token in stream.tolist()
    }


def test_evaluation_columns_go_on_from_window_to_window():
    windows = list(EvalColumns(STREAM, 1, spec(bptt=30), Loading(0, 1, 10)))
    assert [window.start for window in windows] == [True, False, False, False]
    for before, after in zip(windows, windows[1:], strict=False):
        assert torch.equal(after.inputs[:, 0], before.targets[:, -1])


def test_data_says_what_it_is(folder):
    data = built(folder, bptt=7)
    assert (data.kind, data.num_classes, data.input_shape) == ("text", 5, (7,))  # a b c <eos> <unk>
    assert {name: source.count for name, source in data.evaluation.items()} == {"val": 3, "test": 3}
    assert data.train.samples_per_step == 4 * 7


@pytest.mark.parametrize(
    "wrong, key, valid",
    [
        ({"bptt": 0}, "data.bptt", ()),
        ({"bptt": "long"}, "data.bptt", ()),
        ({"eval_columns": -1}, "data.eval_columns", ()),
        ({"vocabulary": 2}, "data.vocabulary", ()),
        ({"batch_size": 176}, "batch_size", "1 to 175"),  # there are 350 tokens
        ({"batch_size": 2, "world": 3}, "batch_size", "3 or more"),
    ],
)
def test_values_that_cannot_be_are_named(folder, wrong, key, valid):
    with refused(key, wrong[key.rpartition(".")[2]], valid):
        built(folder, **wrong)


def test_the_largest_batch_trains(folder):
    batches = list(built(folder, batch_size=175).train.epoch(0))
    assert len(batches) == 1 and batches[0].inputs.shape == (175, 1)
