"""A small modern GPT. It maps (tokens [B, T], None) to (logits [B, T, V], None)."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from koala.errors import ConfigError
from koala.models.language import TransformerSpec


class GPT(nn.Module):
    """A small GPT as they are built today: RMSNorm before each sublayer, rotary positions (arXiv 2104.09864), SwiGLU
    (arXiv 2002.05202), no biases, tied embedding.

    Weights start from N(0, 0.02^2); what is added to the residual stream is smaller by sqrt(2 layers), as in GPT-2.
    """

    def __init__(self, vocab: int, width: int, layers: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(vocab, width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(ModernBlock(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm, self.decoder = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)
        self.decoder.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                added = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Maps tokens [B, T] to logits [B, T, V]; position t sees tokens 0 ... t."""
        hidden = self.dropout(self.embedding(tokens))
        rotation = self.blocks[0].rotation(tokens.shape[1], hidden)
        for block in self.blocks:
            hidden = block(hidden, rotation)
        return self.decoder(self.norm(hidden)), None


class ModernBlock(nn.Module):
    """One layer of ``GPT``."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.heads, self.features, self.rate = heads, width // heads, dropout
        self.norm1, self.norm2, self.dropout = nn.RMSNorm(width), nn.RMSNorm(width), nn.Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, feedforward, bias=False) for _ in range(2))
        self.down = nn.Linear(feedforward, width, bias=False)

    def rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, features / 2] of each position's angles."""
        half = torch.arange(0, self.features, 2, device=like.device) / self.features
        angles = torch.arange(length, device=like.device)[:, None] * 10_000.0**-half
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Maps [B, T, width] to the same shape."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (rotated(part, *rotation) for part in (query, key))
        rate = self.rate if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.attention_out(seen.transpose(1, 2).flatten(2)))
        inner = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(inner)) * self.up(inner)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + half}) of features by its angle."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


class GPTSpec(TransformerSpec):
    """See GPT; a head's number of features must be even."""

    width: Annotated[int, Field(ge=2)]

    def build(self, vocab: int, length: int) -> nn.Module:
        """Builds the network for ``vocab`` tokens; contexts may have any length."""
        if self.width // self.heads % 2:
            raise ConfigError("model.heads", self.heads, "rotary positions take an even number of features a head")
        return GPT(vocab, self.width, self.layers, self.heads, self.feedforward, self.dropout)
