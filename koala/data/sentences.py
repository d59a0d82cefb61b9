"""Sentences, or pairs of them, with classes: tokenized once, and then held on the device as images are."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from koala.data import resident
from koala.data.augment import Draws
from koala.data.base import Data, Loading
from koala.data.spec import SentenceSpec
from koala.data.tables import labels_of, split_tables, text_of
from koala.data.tokens import pretrained

if TYPE_CHECKING:  # half a second to import, and needless when the tokens are cached
    from datasets import Dataset

PADDING = -1  # where a sentence has no token; each model has an id of its own for it
_FORMAT = 1  # part of every cache's name: raise it when the same files would give other tokens


class Tokens:
    """Tokens are kept in half the bytes that an embedding wants, and not augmented."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> Draws:
        """Draws nothing."""
        return Draws(crop=None, flip=None, cutout=None)

    def __call__(self, tokens: Tensor, draws: Draws | None = None) -> Tensor:
        return tokens.long()


def build(spec: SentenceSpec, loading: Loading) -> Data:
    """See koala.data.build. Tokens are cached below ``data_root``."""

    def make() -> tuple[resident.Splits, int | None]:
        tables = split_tables(spec, Path(loading.data_root))
        labels = {split: labels_of(table, spec, split) for split, table in tables.items()}
        tokens = tokenized({split: _sentences(table, spec, split) for split, table in tables.items()}, spec)
        return {split: (tokens[split], labels[split][0]) for split in tables}, labels["train"][1]

    decided_by = (_FORMAT, spec.tokenizer, spec.length)
    splits, commit = resident.kept(spec, Path(loading.data_root), decided_by, make)
    data = resident.held(spec, splits, Tokens(), loading, commit)
    data.vocabulary = 1 + max(tokens.max().item() for tokens, _ in splits.values())
    return data


def tokenized(splits: dict[str, list[list[str]]], spec: SentenceSpec) -> dict[str, Tensor]:
    """Numbers sentences by the tokenizer of ``spec``, with the marks that its model expects.

    Args:
        splits: of each, the sentences; of pairs, the first and the second ones.

    Returns:
        int32 [N, spec.length] of each split; ``PADDING`` after a sentence.
    """
    tokenizer, tokens = pretrained(spec.tokenizer), {}
    for split, sentences in splits.items():
        encoded = tokenizer(*sentences, truncation=True, max_length=spec.length)["input_ids"]
        tokens[split] = torch.full((len(encoded), spec.length), PADDING, dtype=torch.int32)
        for row, ids in zip(tokens[split], encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
    return tokens


def _sentences(table: "Dataset", spec: SentenceSpec, split: str) -> list[list[str]]:
    """The columns of text of a split."""
    columns = {key: getattr(spec, key) for key in spec.sample_columns}
    return [text_of(table, f"data.{key}", name, split) for key, name in columns.items() if name is not None]
