"""Text to numbers: a vocabulary, and one stream of token ids for each split, cached on disk."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from koala.data.cache import Kept, cached
from koala.data.corpus import Source, source
from koala.data.files import SPLITS
from koala.data.fingerprint import fingerprint
from koala.data.spec import TextSpec
from koala.data.tables import commit_of
from koala.errors import ConfigError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

EOS, UNK, PAD = "<eos>", "<unk>", "<pad>"
BPE_TYPES = 8000  # of a byte-pair encoding that is trained here, unless data.vocabulary says
_FORMAT = 3  # part of every cache's name: raise it when tokenisation or the vocabulary's order changes


@dataclass
class Corpus:
    """Tokenised text: ``vocabulary[id]`` is a token, ``streams[split]`` int64 [tokens].

    Of words 0 is ``<unk>`` and 1 ``<eos>``; of sub-words the last one is ``<pad>``, which occurs in no stream.
    """

    vocabulary: list[str]
    streams: dict[str, Tensor]
    commit: str | None = None  # of the hub, if known


def load(spec: TextSpec, data_root: Path) -> Corpus:
    """Returns the tokenised text of a data set, from the cache below ``data_root`` which is filled otherwise.

    Raises:
        ConfigError: the text cannot be had, or the cache cannot be written.
    """
    key = repr(
        (_FORMAT, fingerprint(spec, data_root), spec.hub_config, spec.text_column, spec.tokenizer, spec.vocabulary)
    )
    file = data_root / f"{spec.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"

    def make() -> Kept:
        text = source(spec, data_root)
        corpus = tokenise(text, spec.vocabulary) if spec.tokenizer is None else sub_words(text, spec)
        streams = {split: stream.int() for split, stream in corpus.streams.items()}
        return Kept(streams, {"vocabulary": json.dumps(corpus.vocabulary), "commit": commit_of(spec) or ""})

    kept = cached(file, make)
    streams = {split: kept.tensors[split].long() for split in SPLITS}
    return Corpus(json.loads(kept.notes["vocabulary"]), streams, kept.notes.get("commit") or None)


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


def sub_words(text: Source, spec: TextSpec) -> Corpus:
    """Numbers the sub-words of ``text`` by the tokenizer of ``spec``, line by line; nothing stands between lines.

    Raises:
        ConfigError: the tokenizer cannot be had, or ``data.vocabulary`` is given for one that is already trained.
    """
    if spec.tokenizer == "bpe":
        tokenizer = _trained(text, spec.vocabulary or BPE_TYPES)
    elif spec.vocabulary is None:
        tokenizer = pretrained(spec.tokenizer).backend_tokenizer
    else:
        reason = f"data.tokenizer={spec.tokenizer} has its own"
        raise ConfigError("data.vocabulary", spec.vocabulary, reason, valid="null")
    streams = {}
    for split in SPLITS:
        lines = [" ".join(words) for words in text.lines(split)]
        encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
        streams[split] = torch.tensor([token for line in encoded for token in line.ids])
    vocabulary = tokenizer.get_vocab()
    return Corpus([*sorted(vocabulary, key=vocabulary.get), PAD], streams)


def _trained(text: Source, size: int) -> "Tokenizer":
    """A byte-pair encoding with word ends marked, as GPT-1's is, learned from the training split."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, special_tokens=[UNK], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((" ".join(words) for words in text.lines("train")), trainer)
    return tokenizer


def pretrained(name: str) -> "PreTrainedTokenizerFast":
    """A tokenizer of transformers, by its hub id or local folder.

    Raises:
        ConfigError: it cannot be loaded, has no vocabulary, or is none of the library `tokenizers`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if len(tokenizer.backend_tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
            raise ValueError("it has no vocabulary")  # what transformers makes of a folder with a model alone
        return tokenizer
    except (OSError, ValueError, AttributeError) as error:  # unreachable, unknown, or none of `tokenizers`
        reason = f"cannot be loaded ({first_line(error)})"
        raise ConfigError("data.tokenizer", name, reason, valid="a local folder with its tokenizer.json") from error
