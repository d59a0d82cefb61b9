"""The GPTs: weight counts, transformers' network and formulas written out as truth, embeddings that stay frozen."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml

from koala.models import build
from tests.refused import refused


@pytest.fixture
def config(root):
    return lambda name, **keys: yaml.safe_load((root / f"configs/model/{name}.yaml").read_text()) | keys


def make(cfg, vocab=51, bptt=16):
    torch.manual_seed(0)
    return build(cfg, kind="text", num_classes=vocab, input_shape=(bptt,))


SMALL = {"width": 24, "layers": 2, "heads": 4, "feedforward": 40}


def test_gpt1_has_the_weights_that_the_released_log_counts(config):
    with torch.device("meta"):
        model = make(config("gpt1-released", pretrained=None), vocab=40_479, bptt=256)
    assert sum(p.numel() for p in model.parameters()) == 59_635_968
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 28_351_488


def test_gpt1_is_transformers_gpt1_with_its_weights(config):
    """OpenAIGPT is the same post-norm network; its GELU is the tanh approximation, which is set to the exact one."""
    from transformers import OpenAIGPTConfig, OpenAIGPTModel

    truth = OpenAIGPTModel(
        OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=4, afn="gelu",
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ).double().eval()  # fmt: skip
    model = make(config("gpt1-released", pretrained=None, context=16, **(SMALL | {"feedforward": 96}))).double()
    with torch.no_grad():
        model.tokens[:-1].copy_(truth.tokens_embed.weight)
        model.positions.copy_(truth.positions_embed.weight)
        for ours, theirs in zip(model.blocks, truth.h, strict=True):
            theirs.mlp.act = torch.nn.GELU()
            projections = (ours.query, ours.key, ours.value)
            for part, weight, bias in zip(
                projections, theirs.attn.c_attn.weight.T.chunk(3), theirs.attn.c_attn.bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            linears = (ours.out, theirs.attn.c_proj), (ours.mlp[0], theirs.mlp.c_fc), (ours.mlp[2], theirs.mlp.c_proj)
            for part, conv in linears:
                part.weight.copy_(conv.weight.T)
                part.bias.copy_(conv.bias)
            ours.norm1.load_state_dict(theirs.ln_1.state_dict())
            ours.norm2.load_state_dict(theirs.ln_2.state_dict())
        tokens = torch.randint(50, (3, 16))
        expected = truth(tokens).last_hidden_state @ truth.tokens_embed.weight.T
        logits, state = model(tokens)
    torch.testing.assert_close(logits[..., :-1], expected, rtol=0, atol=1e-10)
    assert state is None and (logits[..., -1] == 0).all()  # the padding token's vector is zero


def test_pretrained_embeddings_of_a_folder_are_taken_and_stay_frozen(config, tmp_path):
    from transformers import OpenAIGPTConfig, OpenAIGPTModel

    truth = OpenAIGPTModel(OpenAIGPTConfig(vocab_size=50, n_positions=32, n_embd=24, n_layer=1, n_head=4))
    truth.save_pretrained(tmp_path)
    model = make(config("gpt1-released", pretrained=str(tmp_path), context=16, **SMALL))
    assert torch.equal(model.tokens[:-1], truth.tokens_embed.weight)
    assert torch.equal(model.positions, truth.positions_embed.weight[:16])
    model(torch.randint(50, (2, 16)))[0].square().mean().backward()
    assert model.tokens.grad is None and model.positions.grad is None
    assert all(p.grad is not None for p in model.blocks.parameters())
    with refused("model.pretrained", str(tmp_path), mentions="[50, 24]"):
        make(config("gpt1-released", pretrained=str(tmp_path), context=16, **SMALL), vocab=61)
    with refused("model.pretrained", "nobody/nothing"):
        make(config("gpt1-released", pretrained="nobody/nothing", context=16, **SMALL))


def test_gpt1_has_second_derivatives(config):
    model = make(config("gpt1-released", pretrained=None, context=16, **SMALL))
    weight = model.blocks[0].query.weight
    loss = F.cross_entropy(model(torch.randint(50, (2, 16)))[0].flatten(0, 1), torch.randint(50, (32,)))
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.abs().sum() > 0


def test_gpt_small_is_its_formulas_written_out(config):
    model = make(config("gpt-small", **SMALL)).double()
    tokens = torch.randint(50, (2, 9))
    hidden = model.embedding.weight[tokens]
    for block in model.blocks:

        def norm(x, gain):
            return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * gain

        query, key, value = (norm(hidden, block.norm1.weight) @ block.qkv.weight.T).chunk(3, -1)
        out = torch.zeros_like(hidden)
        for head in range(4):
            span = slice(6 * head, 6 * head + 6)
            angle = torch.arange(9)[:, None].double() / 10_000 ** (torch.arange(3) / 3)

            def turned(x, angle=angle):
                pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
                return torch.cat([pairs.real, pairs.imag], -1)

            scores = turned(query[..., span]) @ turned(key[..., span]).transpose(1, 2) / math.sqrt(6)
            seen = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
            out[..., span] = seen @ value[..., span]
        hidden = hidden + out @ block.attention_out.weight.T
        inner = norm(hidden, block.norm2.weight)
        gate, up = inner @ block.gate.weight.T, inner @ block.up.weight.T
        hidden = hidden + (gate * gate.sigmoid() * up) @ block.down.weight.T
    expected = norm(hidden, model.norm.weight) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-6)  # angles are float32 in the model


@pytest.mark.parametrize(
    ("name", "keys", "key", "value"),
    [
        ("gpt-small", {"width": 6, "heads": 2}, "model.heads", 2),
        ("gpt-small", {"heads": 3}, "model.heads", 3),
        ("gpt1-released", {"context": 8, "pretrained": None}, "data.bptt", 16),
    ],
)
def test_sizes_that_cannot_be_are_named(config, name, keys, key, value):
    with refused(key, value):
        make(config(name, **keys))
