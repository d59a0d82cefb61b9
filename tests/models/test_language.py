"""Language models: sizes by formula, causality, carried state, evaluation that does not depend on its batches."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from koala.data import Loading
from koala.data.spec import TextSpec
from koala.data.text import EvalColumns
from koala.models import build
from tests.refused import refused

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
NAMES = ["tiny-lstm", "larger-lstm", "tiny-transformer", "gpt1-small", "gpt-small"]
RELEASED = {"pretrained": None, "context": 16}  # it has no dropout


def config(name, **changes):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | changes


def model_of(name, vocab=50, bptt=16, **changes):
    torch.manual_seed(0)
    cfg = config(name, **(RELEASED if name == "gpt1-released" else {"dropout": 0.0}) | changes)
    return build(cfg, kind="text", num_classes=vocab, input_shape=(bptt,))


def lstm_parameters(vocab, width, layers=2):
    gates = 4 * width  # input, forget, cell, output; each with two biases in torch
    return vocab * width + vocab + layers * (gates * width + gates * width + 2 * gates)


def transformer_parameters(vocab, width, feedforward, layers, context=0, bias=True):
    attention = 4 * (width * width + width)
    block = attention + 2 * width * feedforward + feedforward + width + 4 * width  # two LayerNorms
    return vocab * width + bias * vocab + context * width + layers * block


@pytest.mark.parametrize(
    "name, vocab, expected",
    [
        ("tiny-lstm", 10_000, 2_653_200),  # of the paper
        ("larger-lstm", 10_000, lstm_parameters(10_000, 1500)),
        ("tiny-transformer", 33_278, transformer_parameters(33_278, 200, 200, 2)),
        ("gpt1-small", 33_278, transformer_parameters(33_278, 768, 3072, 4, context=256, bias=False)),
    ],
)
def test_parameter_counts(name, vocab, expected):
    with torch.device("meta"):
        model = build(config(name), kind="text", num_classes=vocab, input_shape=(35,))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.decoder.weight is model.embedding.weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocab", [10_000, 33_278])
def test_first_loss_is_that_of_a_uniform_guess(name, vocab):
    model = model_of(name, vocab, bptt=12, dropout=config(name)["dropout"])
    tokens = torch.randint(vocab, (4, 13))
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() / math.log(vocab) - 1) < 0.05


@pytest.mark.parametrize("name", [*NAMES, "gpt1-released"])
@pytest.mark.parametrize("training", [True, False])
def test_no_position_sees_its_future(name, training):
    model = model_of(name, width=24).double().train(training)
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-12)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(2).min() > 1e-4


def test_an_lstm_goes_on_from_its_state():
    model = model_of("tiny-lstm", width=24).double()
    tokens = torch.randint(50, (3, 16))
    full, _ = model(tokens)
    first, state = model(tokens[:, :7])
    second, _ = model(tokens[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), full, rtol=0, atol=1e-12)
    assert [tuple(part.shape) for part in state] == [(2, 3, 24), (2, 3, 24)]


def mean_loss(model, source):
    total, count, state = 0.0, 0, None
    with torch.no_grad():
        for batch in source:
            logits, state = model(batch.inputs, None if batch.start else state)
            losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            total, count = total + losses.item(), count + (batch.targets != -100).sum().item()
    assert count == source.count
    return total / count


@pytest.mark.parametrize("name", ["tiny-lstm", "tiny-transformer"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_evaluation_does_not_depend_on_its_batch_size(name, dtype, tolerance):
    model = model_of(name, width=24).to(dtype).eval()
    stream = torch.randint(50, (1003,))
    spec = TextSpec(name="random", kind="text", bptt=16)
    losses = [mean_loss(model, EvalColumns(stream, 1, spec, Loading(0, 1, batch))) for batch in (1, 3, 10, 64)]
    assert max(losses) - min(losses) < tolerance * losses[0]


def test_evaluation_of_a_carried_state_is_evaluation_without_truncation():
    model = model_of("tiny-lstm", width=24).double().eval()
    stream = torch.randint(50, (999,))
    specs = [TextSpec(name="random", kind="text", bptt=bptt, eval_columns=3) for bptt in (7, 999)]
    short, long = (mean_loss(model, EvalColumns(stream, 1, spec, Loading(0, 1))) for spec in specs)
    assert short == pytest.approx(long, rel=1e-12)


def test_a_transformer_adds_sinusoids_to_scaled_embeddings():
    model, tokens = model_of("tiny-transformer", width=24).double(), torch.randint(50, (2, 16))
    angle = torch.arange(16, dtype=torch.float64)[:, None] / 10_000 ** (torch.arange(12) / 12)
    hidden = math.sqrt(24) * model.embedding.weight[tokens]
    hidden[..., ::2] += angle.sin()
    hidden[..., 1::2] += angle.cos()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16, dtype=torch.float64)
    for block in model.blocks:
        hidden = block(hidden, src_mask=mask)
    torch.testing.assert_close(model(tokens)[0], model.decoder(hidden), rtol=0, atol=1e-5)


def test_layers_of_a_transformer_start_apart():
    first, second = model_of("tiny-transformer").blocks
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_only(name):
    model = model_of(name, width=24, dropout=0.65)
    tokens = torch.randint(50, (2, 16))
    with torch.no_grad():
        assert not torch.equal(model(tokens)[0], model(tokens)[0])
        model.eval()
        assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", ["tiny-lstm", "tiny-transformer", "gpt-small", "gpt1-released"])
def test_ranks_without_columns_may_call_the_model(name):
    logits, _ = model_of(name, width=24)(torch.empty(0, 16, dtype=torch.long))
    assert logits.shape == (0, 16, 50)


@pytest.mark.parametrize(
    "name, changes, key, value",
    [
        ("tiny-lstm", {"arch": "rnn"}, "model.arch", "rnn"),
        ("tiny-lstm", {"width": 0}, "model.width", 0),
        ("tiny-lstm", {"dropout": 1.0}, "model.dropout", 1.0),
        ("tiny-transformer", {"heads": 3}, "model.heads", 3),
        ("gpt1-small", {"context": 8}, "data.bptt", 16),
    ],
)
def test_sizes_that_cannot_be_are_named(name, changes, key, value):
    with refused(key, value):
        model_of(name, **changes)


def test_images_are_refused():
    with refused("model", "tiny-lstm"):
        build(config("tiny-lstm"), kind="images", num_classes=10, input_shape=(3, 32, 32))
