"""The small GPT-1 of KOALA++'s WikiText-2 table, as its authors released it.

It maps (tokens [B, T], None) to (logits [B, T, V], None), and shares the embedding with the output layer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koala.errors import ConfigError, first_line
from koala.models.language import Positive, TransformerSpec


class GPT1Released(nn.Module):
    """GPT-1's Transformer, post-norm, without dropout, between pretrained embeddings that stay as they are.

    Blocks start with torch's initialisation. Attention is four plain linear layers and a softmax: optimizers with
    statistics of linear layers see all of them, and second derivatives exist. With 4 layers of width 768, 12 heads, 256
    positions and a vocabulary of 40,479: 59,635,968 weights, 28,351,488 of them trained.

    Args:
        tokens, positions: frozen embeddings [V, width] and [context, width].
    """

    def __init__(self, tokens: Tensor, positions: Tensor, layers: int, heads: int, feedforward: int):
        super().__init__()
        width = tokens.shape[1]
        self.tokens = nn.Parameter(tokens, requires_grad=False)
        self.positions = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, feedforward) for _ in range(layers))

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Maps tokens [B, T] to logits [B, T, V]; position t sees tokens 0 ... t."""
        hidden = F.embedding(tokens, self.tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(hidden, self.tokens), None


class PostNormBlock(nn.Module):
    """Causal self-attention and a perceptron with GELU, each added to its input and then normalised."""

    def __init__(self, width: int, heads: int, feedforward: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, width] to the same shape."""
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))

    def attend(self, x: Tensor) -> Tensor:
        """Softmax attention of every head to this position and those before."""
        query, key, value = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for part in (self.query, self.key, self.value))  # fmt: skip
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return self.out(seen.transpose(1, 2).flatten(2))


class GPT1ReleasedSpec(TransformerSpec):
    """See GPT1Released. ``pretrained``: where GPT-1's embeddings come from, a hub id or a local folder; null: they are
    drawn from N(0, 0.02^2), and frozen all the same. The last token of a vocabulary pads, and has the zero vector."""

    context: Positive
    pretrained: str | None = None

    def build(self, vocab: int, length: int) -> nn.Module:
        """Builds the network for ``vocab`` tokens and contexts of ``length`` tokens."""
        if length > self.context:
            raise ConfigError("data.bptt", length, f"is longer than model.context={self.context}")
        if self.pretrained is None:
            tokens, positions = (torch.randn(count, self.width) * 0.02 for count in (vocab - 1, self.context))
        else:
            tokens, positions = pretrained_embeddings(self.pretrained)
        for name, table, rows in (("tokens", tokens, vocab - 1), ("positions", positions, self.context)):
            if table.shape[1] != self.width or table.shape[0] < rows or (name == "tokens" and table.shape[0] != rows):
                reason = f"has {name} of {list(table.shape)}, not {[rows, self.width]}"
                raise ConfigError("model.pretrained", self.pretrained, reason, valid="that of the tokenizer's model")
        tokens = torch.cat([tokens, tokens.new_zeros(1, self.width)])
        return GPT1Released(tokens, positions[: self.context].clone(), self.layers, self.heads, self.feedforward)


def pretrained_embeddings(source: str) -> tuple[Tensor, Tensor]:
    """Returns token and position embeddings of a GPT-1 of the Hugging Face hub, or of a local folder.

    Raises:
        ConfigError: it cannot be loaded, or is no GPT-1.
    """
    from transformers import OpenAIGPTModel

    try:
        model = OpenAIGPTModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        valid = (
            "a GPT-1 of the hub, a folder with its config.json and model.safetensors, or null, which draws embeddings"
        )
        reason = f"cannot be loaded: {first_line(error)}"
        raise ConfigError("model.pretrained", source, reason, valid=valid) from error
    return model.tokens_embed.weight.detach().clone(), model.positions_embed.weight.detach().clone()
