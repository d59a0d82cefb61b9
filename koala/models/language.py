"""Language models on torch's own modules: an LSTM, and the Transformers of PyTorch's example and of GPT-1.

All map (tokens [B, T], state) to (logits [B, T, V], state) and share the input embedding with the output
layer (Press and Wolf, arXiv 1608.05859). The state is nn.LSTM's, a tuple (h, c) of [layers, B, width];
Transformers have none.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from koala.errors import ConfigError
from koala.schema import Schema, Word

Positive = Annotated[int, Field(ge=1)]
State = tuple[Tensor, Tensor] | None


class LSTM(nn.Module):
    """LSTM with embedding and layers of one width; dropout on the embedding, between layers and on the output.

    Zaremba et al. (arXiv 1409.2329) with the initialisation of PyTorch's word-language-model example.
    """

    def __init__(self, vocab: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout if layers > 1 else 0.0, batch_first=True)
        self.decoder = nn.Linear(width, vocab)
        self.decoder.weight = self.embedding.weight
        init_word_model(self)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Maps tokens [B, T] and the state that those before left (None: zeros) to logits [B, T, V] and a state."""
        hidden, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.decoder(self.dropout(hidden)), state


class Transformer(nn.Module):
    """Causal Transformer encoder with sinusoidal positions, as in PyTorch's word-language-model example.

    Each batch is a context of its own: nothing is carried to the next one. Dropout acts on the embedding and,
    inside torch's layers, on attention, activations and what every sublayer adds.

    Args:
        length: longest context; fixes the table of positions.
    """

    def __init__(
        self,
        vocab: int,
        length: int,
        width: int,
        layers: int,
        heads: int,
        feedforward: int,
        dropout: float,
        *,
        activation: str = "relu",
        bias: bool = True,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.dropout = nn.Dropout(dropout)
        # Not nn.TransformerEncoder, which copies one layer and so starts all of them from the same weights.
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, feedforward, dropout, activation, batch_first=True)
            for _ in range(layers)
        )
        self.decoder = nn.Linear(width, vocab, bias=bias)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("future", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)
        self._init_weights(length, width)

    def _init_weights(self, length: int, width: int) -> None:
        init_word_model(self)
        rate = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angle = torch.arange(length)[:, None] * rate
        table = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]
        self.register_buffer("positions", table, persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to [B, T, width]: scaled embedding plus sinusoidal positions."""
        scale = math.sqrt(self.embedding.embedding_dim)
        return self.embedding(tokens) * scale + self.positions[: tokens.shape[1]]

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Maps tokens [B, T] to logits [B, T, V]; position t sees tokens 0 ... t."""
        hidden = self.dropout(self.embed(tokens))
        future = self.future[: tokens.shape[1], : tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, src_mask=future, is_causal=True)
        return self.decoder(hidden), None


class GPT1(Transformer):
    """GPT-1's Transformer (Radford et al. 2018): learned positions, GELU, every weight from N(0, 0.02), no
    output bias.

    Args:
        context: number of learned positions.
    """

    def __init__(self, vocab: int, context: int, width: int, layers: int, heads: int, feedforward: int, dropout: float):
        super().__init__(vocab, context, width, layers, heads, feedforward, dropout, activation="gelu", bias=False)

    def _init_weights(self, length: int, width: int) -> None:
        self.positions = nn.Parameter(torch.empty(length, width))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:  # the others are LayerNorm's gains
                nn.init.normal_(parameter, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to [B, T, width]: embedding plus learned position."""
        return self.embedding(tokens) + self.positions[: tokens.shape[1]]


def init_word_model(model: nn.Module) -> None:
    """Embedding uniform in +-0.1 and no output bias at first; the other layers keep torch's
    initialisation."""
    nn.init.uniform_(model.embedding.weight, -0.1, 0.1)
    nn.init.zeros_(model.decoder.bias)


class LanguageSpec(Schema):
    """The keys that every language model has."""

    name: Word
    kind: Literal["language"]
    arch: str
    width: Positive
    layers: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class LSTMSpec(LanguageSpec):
    """See LSTM."""

    def build(self, vocab: int, length: int) -> nn.Module:
        """Builds the network for ``vocab`` words."""
        return LSTM(vocab, self.width, self.layers, self.dropout)


class TransformerSpec(LanguageSpec):
    """See Transformer."""

    heads: Positive
    feedforward: Positive

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "TransformerSpec":
        if self.width % self.heads:
            raise ConfigError("heads", self.heads, f"must divide model.width={self.width}")
        return self

    def build(self, vocab: int, length: int) -> nn.Module:
        """Builds the network for ``vocab`` words and contexts of ``length`` tokens."""
        return Transformer(vocab, length, self.width, self.layers, self.heads, self.feedforward, self.dropout)


class GPT1Spec(TransformerSpec):
    """See GPT1; ``context``: number of learned positions."""

    context: Positive

    def build(self, vocab: int, length: int) -> nn.Module:
        """Builds the network for ``vocab`` words and contexts of ``length`` tokens."""
        if length > self.context:
            raise ConfigError("data.bptt", length, f"is longer than model.context={self.context}")
        return GPT1(vocab, self.context, self.width, self.layers, self.heads, self.feedforward, self.dropout)
