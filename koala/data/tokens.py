"""Text to numbers: a vocabulary, and one stream of token ids for each split, cached on disk."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koala.data.cache import Kept, cached
from koala.data.corpus import SPLITS, Source, source
from koala.data.fingerprint import fingerprint
from koala.data.spec import TextSpec

EOS, UNK = "<eos>", "<unk>"
_FORMAT = 2  # part of every cache's name: raise it when tokenisation or the vocabulary's order changes


@dataclass
class Corpus:
    """Tokenised text: ``vocabulary[id]`` is a word (0: ``<unk>``, 1: ``<eos>``), ``streams[split]`` int64 [tokens]."""

    vocabulary: list[str]
    streams: dict[str, Tensor]


def load(spec: TextSpec, data_root: Path) -> Corpus:
    """Returns the tokenised text of a data set, from the cache below ``data_root`` or else to be found there next time.

    Raises:
        ConfigError: the text cannot be had, or the cache cannot be written.
    """
    key = repr((_FORMAT, fingerprint(spec, data_root), spec.hub_config, spec.text_column, spec.vocabulary))
    file = data_root / f"{spec.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"

    def make() -> Kept:
        corpus = tokenise(source(spec), spec.vocabulary)
        streams = {split: stream.int() for split, stream in corpus.streams.items()}
        return Kept(streams, {"vocabulary": json.dumps(corpus.vocabulary)})

    kept = cached(file, make)
    return Corpus(json.loads(kept.notes["vocabulary"]), {split: kept.tensors[split].long() for split in SPLITS})


def tokenise(text: Source, limit: int | None = None) -> Corpus:
    """Numbers the words of ``text``; every line ends in ``<eos>``.

    The vocabulary is the training split's, after ``<unk>`` and ``<eos>`` by falling frequency; words outside it
    are ``<unk>``.

    Args:
        limit: largest size of the vocabulary, ``<unk>`` and ``<eos>`` included; None: every word.
    """
    counts = Counter(word for line in text.lines("train") for word in line)
    words = [word for word, _ in counts.most_common() if word not in (UNK, EOS)]
    vocabulary = [UNK, EOS, *words[: None if limit is None else limit - 2]]
    number = {word: index for index, word in enumerate(vocabulary)}
    streams = {}
    for split in SPLITS:
        ids = (number.get(word, 0) for line in text.lines(split) for word in (*line, EOS))
        streams[split] = torch.tensor(list(ids))
    return Corpus(vocabulary, streams)
