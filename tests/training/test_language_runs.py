"""Language models through the real loop: every filter, carried state, ranks, the plateau schedule, honest testing."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from koala import data, models
from koala.data import corpus, tokens
from tests.training.conftest import closest, same_bits, without_times

WORDS = 20
SMALL = [
    *"data=ptb model=tiny-lstm schedule=plateau model.width=16 model.dropout=0.2 data.bptt=10".split(),
    *"batch_size=6 eval_batch_size=4 epochs=2".split(),
]


def write_text(folder, *, valid=(1, 5)):
    """The override that names a folder of text, in which each word is followed by one of two; `valid`: by which."""
    folder.mkdir()
    draw = random.Random(0)
    for name, lines, steps in (("train.txt", 300, (1, 5)), ("valid.txt", 40, valid), ("test.txt", 40, (1, 5))):
        word, text = 0, []
        for _ in range(lines):
            line = []
            for _ in range(7):
                word = (3 * word + draw.choice(steps)) % WORDS
                line.append(f"w{word}")
            text.append(" ".join(line))
        (folder / name).write_text("\n".join(text) + "\n")
    return f"data.path={folder}"


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def misleading_text(tmp_path):
    """What is learned of it makes validation worse, on any processor: there a word is followed by two others."""
    return write_text(tmp_path / "text", valid=(2, 7))


OPTIMIZERS = {
    "sgd": ["optim=sgd", "optim.lr=5", "optim.momentum=0"],
    "adam": ["optim=adam", "optim.lr=1e-2"],
    "koala-v": ["optim=koala-v"],
    "koala-m": ["optim=koala-m"],
    "koala++": ["optim=koala++"],
    "sofim": ["optim=sofim"],
}


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer_learns_words(runs, text, optim):
    chosen = [*SMALL, text, *optim, "epochs=4"]
    record = runs.launch(*chosen)
    assert record["status"] == "finished" and record["throughput_unit"] == "tokens"
    rows = runs.history(*chosen)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < math.log(WORDS + 2)
    for row in rows:
        assert row["train_ppl"] == pytest.approx(math.exp(row["train_loss"]))
        assert row["val_ppl"] == pytest.approx(math.exp(row["val_loss"]))


@pytest.mark.parametrize(
    "model",
    [
        ["model=tiny-transformer"],
        ["model=gpt1-small", "model.layers=1", "model.heads=2", "model.feedforward=32"],
        ["model=tiny-transformer", "precision=bf16"],
    ],
    ids=["tiny-transformer", "gpt1-small", "bf16"],
)
def test_transformers_train(runs, text, model):
    chosen = [*SMALL, text, "model.width=16", *model, "optim=koala-m", "epochs=3"]
    assert runs.launch(*chosen)["metrics"]["final"]["test_loss"] < math.log(WORDS + 2)


@pytest.mark.parametrize("optim, precision", [("adam", "fp32"), ("koala-m", "bf16")])
def test_broken_off_within_an_epoch_and_resumed_is_bit_identical(runs, text, optim, precision):
    straight = [*SMALL, text, *OPTIMIZERS[optim], f"precision={precision}"]
    runs.launch(*straight)
    broken = [*straight, runs.elsewhere("broken"), "checkpoint_every=0"]
    for step in (17, 63):  # of 40 in each epoch
        runs.break_off(step, *broken)
    runs.launch(*broken)
    assert same_bits(runs.weights(*broken), runs.weights(*straight))
    assert without_times(runs.history(*broken)) == without_times(runs.history(*straight))


def test_the_state_is_part_of_the_checkpoint(runs, text):
    """Without it the resumed run would go on from zeros, and the test above would not be able to tell on easy text."""
    chosen = [*SMALL, text, "optim=adam", "checkpoint_every=0"]
    runs.break_off(17, *chosen)
    state = torch.load(runs.checkpoints(*chosen)[-1], weights_only=True)["task"]["state"]
    assert [tuple(part.shape) for part in state] == [(2, 6, 16)] * 2
    assert all(part.abs().max() > 0 for part in state)


def close(rows, expected):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for key in ("train_loss", "val_loss"):
            assert row[key] == pytest.approx(other[key], rel=1e-10), key


@pytest.mark.dist
def test_one_process_broken_off_is_resumed_by_two(runs, text):
    """Columns, and the state with them, are split over ranks; without dropout, whose masks belong to a rank."""
    alone = [*SMALL, text, "precision=fp64", "model.dropout=0.0", *OPTIMIZERS["koala-m"]]
    expected = runs.launch(*alone)
    broken = [*alone, runs.elsewhere("broken"), "checkpoint_every=0"]
    runs.break_off(17, *broken)
    record = runs.launch(*broken, "cpu_procs=2", "ranks=1")
    close(runs.history(*broken), runs.history(*alone))
    one, two = (result["metrics"]["final"]["test_loss"] for result in (expected, record))
    assert two == pytest.approx(one, rel=1e-10)
    states = [torch.load(runs.checkpoints(*run)[-1], weights_only=True)["task"]["state"] for run in (broken, alone)]
    for together, full in zip(*states, strict=True):
        torch.testing.assert_close(together, full, rtol=0, atol=1e-9)


@pytest.mark.extended
@pytest.mark.dist
@pytest.mark.parametrize("model", ["tiny-lstm", "tiny-transformer"])
def test_sharded_over_two_ranks_is_one_process(runs, text, model):
    """Tied weights belong to two modules, and the tested weights are those of an earlier epoch."""
    alone = [*SMALL, text, f"model={model}", "model.width=16", "precision=fp64", "model.dropout=0.0", "optim=koala-m"]
    expected = runs.launch(*alone)
    sharded = [*alone, "strategy=fsdp", "cpu_procs=2", runs.elsewhere("sharded")]
    record = runs.launch(*sharded)
    close(runs.history(*sharded), runs.history(*alone))
    one, two = (result["metrics"]["final"]["test_loss"] for result in (expected, record))
    assert two == pytest.approx(one, rel=1e-10)


def test_plateau_quarters_the_rate_when_validation_stops_improving(runs, misleading_text):
    chosen = [*SMALL, misleading_text, "optim=adam", "optim.lr=1e-2", "epochs=8"]
    rate, best, drops = 1e-2, math.inf, 0
    runs.launch(*chosen)
    for row in runs.history(*chosen):
        assert row["lr"] == pytest.approx(rate)
        if row["val_loss"] < best:
            best = row["val_loss"]
        else:
            rate, drops = rate / 4, drops + 1
    assert drops > 0


def test_the_best_validation_is_tested_once(runs, misleading_text):
    """The tested weights are those of validation's lowest value, nothing later."""
    chosen = [*SMALL, misleading_text, "optim=adam", "optim.lr=1e-2", "epochs=6", "schedule=constant"]
    record = runs.launch(*chosen)
    rows, final = runs.history(*chosen), record["metrics"]["final"]
    assert not [key for row in rows for key in row if key.startswith("test")]
    best = min(rows, key=lambda row: row["val_loss"])
    assert best is not rows[-1] and final["selected_epoch"] == best["epoch"]

    cfg = runs.compose(*chosen)
    text = tokens.tokenise(corpus.TextFiles(cfg.data.path))
    model = models.build(cfg.model, kind="text", num_classes=len(text.vocabulary), input_shape=(10,)).eval()
    model.load_state_dict(torch.load(runs.checkpoints(*chosen)[-1], weights_only=True)["selected"])
    columns = F.pad(text.streams["test"], (1, 0), value=text.vocabulary.index(tokens.EOS))
    assert (len(columns) - 1) % cfg.data.eval_columns == 0  # so that the columns are whole
    width = (len(columns) - 1) // cfg.data.eval_columns
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(columns[None, at : at + width])[0][0], columns[at + 1 : at + width + 1])
            for at in range(0, len(columns) - 1, width)
        ]
    assert final["test_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert final["test_ppl"] == pytest.approx(math.exp(final["test_loss"]))


def test_a_step_over_a_drawn_length_has_the_rate_in_proportion(runs, text):
    """AWD-LSTM's recipe: a first step over n tokens at rate 1 is one of a run of bptt=n at rate n / bptt."""
    chosen = [*SMALL, text, "model.dropout=0", "optim=sgd", "optim.momentum=0", "optim.weight_decay=0", "max_steps=1",
              "seed=2", "grad_clip=null", "schedule=constant", "optim.lr=1"]  # fmt: skip
    drawn = [*chosen, "data.bptt_random=true"]
    cfg = runs.compose(*drawn)
    source = data.build(cfg.data, data.Loading(2, 6, data_root=cfg.data_root)).train
    length = next(iter(source.epoch(0))).inputs.shape[1]
    assert length != cfg.data.bptt == 10
    runs.launch(*drawn)
    fixed = [*chosen, f"data.bptt={length}", f"optim.lr={length / 10}"]
    runs.launch(*fixed)
    assert closest(runs.weights(*drawn), runs.weights(*fixed)) < 1e-6
    assert runs.history(*drawn)[-1]["lr"] == 1, "what is told is the rate of the schedule"


# Two perplexities of text in windows: by tokens, and the older mean over batches that takes the last one as full.
BPE = ["data=pydocs-bpe", "model=gpt1-released", "model.pretrained=null", "model.width=8", "model.heads=2",
       "model.layers=1", "model.feedforward=8", "model.context=16", "data.bptt=16", "data.vocabulary=300",
       "data.eval_columns=32",
       "schedule=constant", "select=last", "max_steps=2", "optim=adamw"]  # fmt: skip


def test_the_older_perplexity_takes_an_incomplete_batch_as_full(runs):
    final = runs.launch(*BPE)["metrics"]["final"]
    cfg = runs.compose(*BPE)
    built = data.build(cfg.data, data.Loading(cfg.seed, cfg.batch_size, 32, data_root=cfg.data_root))
    for split in ("val", "test"):
        batches = list(built.evaluation[split])
        scored = sum((batch.targets != -100).sum().item() for batch in batches)
        assert scored < len(batches) * 32 * 16
        older = math.exp(math.log(final[f"{split}_ppl"]) * scored / (len(batches) * 32 * 16))
        assert final[f"{split}_ppl_by_batch"] == pytest.approx(older, rel=1e-9)
