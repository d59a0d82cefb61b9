"""AWD-LSTM: without dropout torch's LSTM is the truth; what dropout, penalties and frozen matrices do in training."""

import pytest
import torch
import torch.nn.functional as F
import yaml

from koala.models import build

OFF = {"dropout": 0.0, "dropout_between": 0.0, "dropout_input": 0.0, "dropout_words": 0.0, "dropout_recurrent": 0.0}


@pytest.fixture
def make(root):
    cfg = yaml.safe_load((root / "configs/model/awd-lstm.yaml").read_text())

    def make(vocab=50, **keys):
        torch.manual_seed(0)
        small = {"embedding": 12, "width": 20}
        return build(cfg | small | keys, kind="text", num_classes=vocab, input_shape=(16,))

    return make


def test_sizes_are_the_papers(make):
    with torch.device("meta"):
        model = make(vocab=10_000, embedding=400, width=1150)
    gates = [(400, 1150), (1150, 1150), (1150, 400)]
    lstm = sum(4 * outputs * (inputs + outputs + 2) for inputs, outputs in gates)
    assert sum(p.numel() for p in model.parameters()) == 10_000 * 401 + lstm == 24_221_600
    assert [layer.hidden_size for layer in make(layers=1).layers] == [12]


def test_without_dropout_it_is_torchs_lstm_and_goes_on_from_its_state(make):
    model = make(**OFF).double()
    tokens = torch.randint(50, (3, 16))
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden, _ = layer(hidden)
    full, _ = model(tokens)
    torch.testing.assert_close(full, model.decoder(hidden), rtol=0, atol=1e-12)
    first, state = model(tokens[:, :7])
    second, _ = model(tokens[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), full, rtol=0, atol=1e-12)
    assert [tuple(part.shape) for part in state] == [(1, 3, 20)] * 4 + [(1, 3, 12)] * 2


def test_the_penalty_is_of_the_dropped_output_and_of_the_raw_ones_change(make):
    model = make(**OFF | {"dropout": 0.5}).double()
    seen = {}
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.update(dropped=inputs[0]))
    tokens = torch.randint(50, (3, 16))
    model(tokens)
    torch.manual_seed(0)
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden, _ = layer(hidden)
    expected = 2 * seen["dropped"].square().mean() + (hidden[:, 1:] - hidden[:, :-1]).square().mean()
    torch.testing.assert_close(model.penalty, expected, rtol=1e-12, atol=0)
    assert model.penalty.requires_grad
    # one mask for all steps: a feature is dropped from all or none
    dropped = (seen["dropped"] == 0).double().mean(1)
    assert ((dropped == 0) | (dropped == 1)).all() and 0.3 < dropped.mean() < 0.7


@pytest.mark.parametrize("trained", [False, True])
def test_recurrent_matrices_are_dropped_and_train_only_if_asked(make, trained):
    model = make(**OFF | {"dropout_recurrent": 0.5, "train_recurrent": trained})
    tokens = torch.randint(50, (3, 16))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (trained or "weight_hh" not in name), name


def test_evaluation_draws_nothing_and_words_are_dropped_everywhere_at_once(make, monkeypatch):
    model = make().eval()
    tokens = torch.randint(50, (2, 16))
    assert torch.equal(model(tokens)[0], model(tokens)[0]) and model.penalty is None
    model = make(**OFF | {"dropout_words": 0.5}).train()
    seen, lstm = [], torch.lstm
    monkeypatch.setattr(torch, "lstm", lambda hidden, *rest: seen.append(hidden) or lstm(hidden, *rest))
    model(torch.tensor([[7, 8, 7, 9, 7, 8]]))
    inputs = seen[0][0]
    assert torch.equal(inputs[0], inputs[2]) and torch.equal(inputs[0], inputs[4]) and torch.equal(inputs[1], inputs[5])
