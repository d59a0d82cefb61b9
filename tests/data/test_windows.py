"""Windows of text, drawn lengths, sub-words: every token once, functions of (seed, epoch, step), tokenizers by name."""

import math

import pytest
import torch

from koala.data import Loading, build, fingerprint
from koala.data.text import IGNORED, EvalWindows, TrainColumns, TrainWindows, drawn_lengths
from tests.data.test_text import STREAM, pairs, spec
from tests.refused import refused


def windows(stream=STREAM, bptt=30, seed=1, batch_size=8, rank=0, world=1):
    return TrainWindows(stream, spec(bptt=bptt), Loading(seed, batch_size, rank=rank, world=world))


@pytest.mark.parametrize("tokens", [2, 30, 31, 32, 481, 1000])
@pytest.mark.parametrize("world", [1, 3])
def test_windows_score_every_token_but_the_first_once_after_the_one_before(tokens, world):
    stream = STREAM[:tokens]
    truth = {token: token - 1 for token in stream[1:].tolist()}
    ranks = [windows(stream, rank=rank, world=world) for rank in range(world)]
    assert pairs(batch for source in ranks for batch in source.epoch(2)) == truth
    steps = math.ceil(math.ceil((tokens - 1) / 30) / 8)
    assert ranks[0].steps_per_epoch == steps
    seen = [sum((batch.targets != IGNORED).sum().item() for batch in step)
            for step in zip(*(source.epoch(2) for source in ranks), strict=True)]  # fmt: skip
    assert seen == [ranks[0].samples(step, 2) for step in range(steps)]
    held_out = [
        EvalWindows(stream, spec(bptt=30, eval_columns=8), Loading(0, 1, 3, rank, world)) for rank in range(world)
    ]
    assert pairs(batch for source in held_out for batch in source) == truth
    assert held_out[0].count == tokens - 1 and held_out[0].slots == steps * 8 * 30


def test_windows_are_shuffled_by_seed_and_epoch_and_a_resumed_epoch_is_the_rest_of_it():
    def inputs(epoch, start=0, **changes):
        return torch.cat([batch.inputs for batch in windows(**changes).epoch(epoch, start)])

    full = inputs(3)
    assert torch.equal(full[16:], inputs(3, 2)) and torch.equal(full, inputs(3))
    assert not torch.equal(full, inputs(4)) and not torch.equal(full, inputs(3, seed=2))
    assert sorted(full[:, 0].tolist()) == list(range(100, 1100, 30))
    assert (windows().windows.inputs[-1][9:] == 0).all()


def test_drawn_lengths_are_distributed_as_in_awd_lstm_and_cover_the_columns():
    lengths = drawn_lengths(200_000, 70, seed=1)
    assert lengths.sum() == 200_000 and lengths[:-1].min() >= 5
    long = lengths[lengths > 52].double()
    assert abs(len(long) / len(lengths) - 0.95) < 0.015
    assert abs(long.mean() - 70) < 0.5 and abs(long.std() - 5) < 0.3
    assert abs(lengths[lengths <= 52].double().mean() - 35) < 2
    assert drawn_lengths(200_000, 10, seed=1)[:-1].min() == 5
    source = TrainColumns(STREAM, spec(bptt=35, bptt_random=True), Loading(1, 4))
    for epoch in range(3):
        batches = list(source.epoch(epoch))
        assert len(batches) == source.steps_per_epoch
        assert torch.equal(torch.cat([batch.inputs for batch in batches], 1), STREAM.view(4, 250)[:, :-1])
        assert [batch.targets.numel() for batch in batches] == [source.samples(k, epoch) for k in range(len(batches))]
        rest = list(source.epoch(epoch, 2))
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(rest, batches[2:], strict=True))
    assert abs(source.samples_per_step * source.steps_per_epoch - 4 * 249) < source.steps_per_epoch  # their mean
    assert source.lengths(0) != source.lengths(1) and sorted(source.lengths(0)) == sorted(source.lengths(1))


@pytest.fixture
def text(write_text):
    folder = write_text("the cat sat on the mat\n" * 60, "the cat\nsat\n", "on the mat\n")
    return {"kind": "text", "name": "words", "path": str(folder), "windows": True, "bptt": 6}


def built(cfg, tmp_path):
    return build(cfg, Loading(1, 4, 4, data_root=tmp_path / "data"))


def test_sub_words_are_learned_from_the_training_split(text, tmp_path):
    cfg = text | {"tokenizer": "bpe", "vocabulary": 40}
    data = built(cfg, tmp_path)
    assert data.kind == "text" and data.num_classes <= 40 and data.input_shape == (6,)
    # With room for all of six words, each is one token: 360 in training, 359 of them scored.
    assert data.train.windows.scored == 359 and data.evaluation["test"].count == 2
    again = built(cfg, tmp_path / "elsewhere")
    assert torch.equal(data.train.windows.inputs, again.train.windows.inputs)
    few = built(cfg | {"vocabulary": 16}, tmp_path)  # 12 are letters, at a word's end or not
    assert few.num_classes == 16 and few.train.windows.scored > 359


def test_a_tokenizer_of_a_local_folder_is_used_and_known_by_its_content(text, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def save(folder, words):
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
        return text | {"tokenizer": str(folder)}

    cfg = save(tmp_path / "one", ["<unk>", "the", "cat", "sat", "on", "mat"])
    data = built(cfg, tmp_path)
    assert data.num_classes == 7  # and <pad>
    assert data.train.windows.inputs[0].tolist() == [1, 2, 3, 4, 1, 5]
    assert fingerprint(cfg, tmp_path) != fingerprint(text, tmp_path)
    assert fingerprint(save(tmp_path / "two", ["<unk>", "cat", "the"]), tmp_path) != fingerprint(cfg, tmp_path)
    with refused("data.vocabulary", 9, "null"):
        built(cfg | {"vocabulary": 9}, tmp_path)


def test_a_tokenizer_that_cannot_be_had_is_reported(text, tmp_path):
    with refused("data.tokenizer", "nobody/nothing"):
        built(text | {"tokenizer": "nobody/nothing"}, tmp_path)


def test_a_network_is_built_for_the_longest_drawn_length(text, tmp_path):
    data = built(text | {"windows": False, "bptt_random": True}, tmp_path)
    assert data.input_shape == (max(data.train.lengths(0)),) and data.input_shape[0] > text["bptt"]


def test_windows_and_drawn_lengths_exclude_each_other(text, tmp_path):
    with refused("data.bptt_random", True):
        built(text | {"bptt_random": True}, tmp_path)
    with refused("batch_size", 4, "1 to 3"):
        built(text | {"bptt": 160}, tmp_path)
