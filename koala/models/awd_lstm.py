"""AWD-LSTM (Merity, Keskar, Socher: Regularizing and Optimizing LSTM Language Models, arXiv 1708.02182) as in SGDF."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from koala.models.language import LanguageSpec, Positive, init_word_model

Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class AWDLSTMSpec(LanguageSpec):
    """Sizes, dropout and penalties; ``dropout`` is the output's.

    ``train_recurrent`` false is what SGDF's code does: its DropConnect cuts the graph, so that the recurrent matrices
    keep their first values, dropped anew at each step. True is what the AWD-LSTM paper describes.
    """

    embedding: Positive
    dropout_between: Rate
    dropout_input: Rate
    dropout_words: Rate
    dropout_recurrent: Rate
    activation_penalty: Weight  # times the mean square of the last layer's output, after dropout
    difference_penalty: Weight  # times that of the output's change from step to step, before dropout
    train_recurrent: bool

    def build(self, vocab: int, length: int) -> nn.Module:
        """Builds the network for ``vocab`` words."""
        return AWDLSTM(vocab, self)


class AWDLSTM(nn.Module):
    """LSTM layers with weight drop and one dropout mask for all steps; embedding and output layer are shared.

    Its state is (h, c) of each layer in turn, each [1, B, width of the layer].

    Attributes:
        penalty: what the last forward pass in training adds to the loss that is differentiated, 0-dim.
    """

    def __init__(self, vocab: int, spec: AWDLSTMSpec):
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(vocab, spec.embedding)
        widths = [spec.embedding, *[spec.width] * (spec.layers - 1), spec.embedding]
        self.layers = nn.ModuleList(
            nn.LSTM(inputs, outputs, batch_first=True) for inputs, outputs in zip(widths, widths[1:], strict=False)
        )
        for layer in self.layers:
            layer.weight_hh_l0.requires_grad_(spec.train_recurrent)
        self.decoder = nn.Linear(spec.embedding, vocab)
        self.decoder.weight = self.embedding.weight
        init_word_model(self)
        self.penalty: Tensor | None = None

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Maps tokens [B, T] and the state that those before left (None: zeros) to logits [B, T, V] and a state."""
        spec, after = self.spec, []
        words = self.embedding.weight
        if self.training and spec.dropout_words:
            words = words * F.dropout(words.new_ones(len(words), 1), spec.dropout_words)
        hidden = self._locked(F.embedding(tokens, words), spec.dropout_input)
        for index, layer in enumerate(self.layers):
            if state is None:
                before = (hidden.new_zeros(1, len(tokens), layer.hidden_size),) * 2
            else:
                before = state[2 * index : 2 * index + 2]
            recurrent = F.dropout(layer.weight_hh_l0, spec.dropout_recurrent, self.training)
            weights = [layer.weight_ih_l0, recurrent, layer.bias_ih_l0, layer.bias_hh_l0]
            raw, *left = torch.lstm(hidden, before, weights, True, 1, 0.0, self.training, False, True)
            after += left
            last = index == len(self.layers) - 1
            hidden = self._locked(raw, spec.dropout if last else spec.dropout_between)
        self.penalty = self._penalty_of(raw, hidden) if self.training else None
        return self.decoder(hidden), tuple(after)

    def _penalty_of(self, raw: Tensor, dropped: Tensor) -> Tensor:
        change = (raw[:, 1:] - raw[:, :-1]).square()
        difference = change.mean() if change.numel() else change.sum()
        return self.spec.activation_penalty * dropped.square().mean() + self.spec.difference_penalty * difference

    def _locked(self, x: Tensor, rate: float) -> Tensor:
        """Dropout of the same features at every step (Gal and Ghahramani, arXiv 1512.05287)."""
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), rate) if self.training and rate else x
