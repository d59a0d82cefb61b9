"""RoBERTa (Liu et al., arXiv 1907.11692) as a classifier of sentences, transformers' own, drawn or from pretrained
weights."""

from typing import Annotated, Literal

import torch
import transformers
from pydantic import Field, model_validator
from torch import Tensor

from koala.errors import ConfigError, first_line
from koala.schema import Schema, Word

Positive = Annotated[int, Field(ge=1)]


class Roberta(transformers.RobertaForSequenceClassification):
    """transformers', of tokens alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [B, T], negative where there is none, to logits [B, classes]."""
        seen = tokens >= 0
        ids = tokens.where(seen, self.config.pad_token_id)
        return super().forward(ids, attention_mask=seen.long()).logits


class RobertaSpec(Schema):
    """``width``: features; ``context``: most tokens of a sentence; ``vocabulary``: of its tokenizer.

    ``pretrained``: weights to start from, of the same sizes: an id of the Hugging Face hub, or a local folder with its
    config.json and model.safetensors; null: drawn. The classifier is drawn where they have none for so many classes.
    """

    name: Word
    kind: Literal["text-classification"]
    family: Literal["roberta"]
    layers: Positive
    width: Positive
    heads: Positive
    feedforward: Positive
    context: Positive = 512
    vocabulary: Positive = 50265
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    pretrained: str | None = None

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "RobertaSpec":
        if self.width % self.heads:
            raise ConfigError("heads", self.heads, f"must divide model.width={self.width}")
        return self

    def build(self, num_classes: int, length: int, vocabulary: int = 0) -> Roberta:
        """Builds the classifier for sentences of ``length`` tokens from 0 to ``vocabulary`` - 1.

        Raises:
            ConfigError: sentences are too long or have other tokens; or the weights cannot be loaded, may hold code or
                have other sizes.
        """
        if length > self.context:
            raise ConfigError("data.length", length, f"is longer than model.context={self.context}")
        if vocabulary > self.vocabulary:
            raise ConfigError("model.vocabulary", self.vocabulary, f"data.tokenizer gave tokens up to {vocabulary - 1}")
        config = transformers.RobertaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feedforward,
            max_position_embeddings=self.context + 2,  # positions count from the padding's id, 1
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            num_labels=num_classes,
        )
        return self._pretrained(config) if self.pretrained else Roberta(config)

    def _pretrained(self, config: transformers.RobertaConfig) -> Roberta:
        transformers.logging.set_verbosity_error()  # what does not fit becomes one message
        transformers.logging.disable_progress_bar()
        try:
            model, report = Roberta.from_pretrained(
                self.pretrained,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            valid = "a RoBERTa of the hub, a folder with its config.json and model.safetensors, or null"
            reason = f"cannot be loaded: {first_line(error)}"
            raise ConfigError("model.pretrained", self.pretrained, reason, valid=valid) from error
        drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        if others := sorted(name for name in drawn if not name.startswith("classifier.")):
            reason = f"has no {others[0]} of model.width, layers, heads, feedforward, context and vocabulary"
            raise ConfigError("model.pretrained", self.pretrained, reason)
        return model
