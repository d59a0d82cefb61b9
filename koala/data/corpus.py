"""Words to numbers: a text becomes a vocabulary and one stream of token ids for each split, cached on disk."""

import hashlib
import logging
import os
import pickle
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from koala.errors import ConfigError

log = logging.getLogger(__name__)

EOS, UNK = "<eos>", "<unk>"
SPLITS = ("train", "val", "test")
# Names that the common distributions give a split: Mikolov's PTB, WikiText, PyTorch's word-language-model example.
FILES = {
    "train": ("ptb.train.txt", "wiki.train.tokens", "train.txt"),
    "val": ("ptb.valid.txt", "wiki.valid.tokens", "valid.txt"),
    "test": ("ptb.test.txt", "wiki.test.tokens", "test.txt"),
}
_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_CACHE_FORMAT = 1  # part of every cache's name: raise it when tokenisation or the vocabulary's order changes


@dataclass
class Corpus:
    """Tokenised text: ``vocabulary[id]`` is a word (0: ``<unk>``, 1: ``<eos>``), ``streams[split]`` int64 [tokens]."""

    vocabulary: list[str]
    streams: dict[str, Tensor]


class Source(Protocol):
    """Text by lines. ``key`` identifies its content: equal keys, equal text."""

    key: str

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each line of a split ("train", "val" or "test")."""


class TextFiles:
    """Plain text files of one folder, a sentence or paragraph a line, words separated by white space.

    Raises:
        ConfigError: when the folder or a split's file is missing, or a file is empty or not UTF-8.
    """

    def __init__(self, folder: str | Path):
        self._text: dict[str, str] = {}
        digest = hashlib.blake2b(digest_size=16)
        for split, path in local_files(folder).items():
            content = path.read_bytes()
            try:
                self._text[split] = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"data.path={folder}: {path.name} is not UTF-8 text ({error})") from error
            if not content.strip():
                raise ConfigError(f"data.path={folder}: {path.name} has no words")
            digest.update(len(content).to_bytes(8, "little") + content)
        self.key = f"files {digest.hexdigest()}"

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each line; a blank one has none (and still ends in ``<eos>``, as usual for WikiText)."""
        # Lines end in \n alone: str.splitlines would also cut at the exotic separators that occur in WikiText.
        return (line.split() for line in self._text[split].removesuffix("\n").split("\n"))


def local_files(path: str | Path) -> dict[str, Path]:
    """Returns the file of each split in a folder.

    Raises:
        ConfigError: the folder or a split's file is missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.path={folder}: no such folder; it should hold {_names_looked_for()}")
    found = {}
    for split in SPLITS:
        file = next((folder / name for name in FILES[split] if (folder / name).is_file()), None)
        if file is None:
            raise ConfigError(f"data.path={folder}: no {split} split; it should hold {_names_looked_for()}")
        found[split] = file
    return found


def _names_looked_for() -> str:
    return ", ".join(" or ".join(FILES[split]) for split in SPLITS)


class HubText:
    """A text data set of the Hugging Face hub (or a local folder in its format), a line of text a row.

    Args:
        hub: data set id.
        config: name of its configuration, where it has several.
        revision: branch or commit; data sets that still ship a loading script are read from
            ``refs/convert/parquet``.
        column: the column of text.

    Raises:
        ConfigError: when it cannot be reached or has another form.
    """

    def __init__(self, hub: str, config: str | None, revision: str | None, column: str):
        self._arguments = {"path": hub, "name": config, "revision": revision}
        self._column = column
        self.key = f"hub {hub} {config} {revision} {column}"

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each row."""
        import datasets

        hub = self._arguments["path"]
        try:
            rows = datasets.load_dataset(**self._arguments, split=_HUB_SPLITS[split])
        except (OSError, ValueError) as error:  # unreachable, not found; no such configuration or split
            raise ConfigError(
                f"data.hub={hub}: cannot be loaded ({str(error).splitlines()[0]}); data.path=FOLDER reads "
                f"text files instead: {_names_looked_for()}"
            ) from error
        if self._column not in rows.column_names:
            raise ConfigError(f"data.text_column={self._column}: {hub} has {', '.join(rows.column_names)}")
        return (line.split() for line in rows[self._column])


class PythonDocs:
    """The help topics that come with Python (``help("LAMBDA")``): a small real text that is on every machine.

    About 95,000 tokens; the text varies a little with Python's version, so compare perplexities under one version
    only. A line is a paragraph in lower case, punctuation apart. Topics quote each other: a paragraph counts where
    it is met first, so that no test paragraph is seen in training. Of every 100 paragraphs, topics in alphabetical
    order, 80 are for training, then 10 for validation and 10 for testing.
    """

    def __init__(self) -> None:
        self.key = f"pydocs {sys.version_info[:3]}"

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each paragraph."""
        from pydoc_data.topics import topics

        paragraphs: dict[tuple[str, ...], None] = {}  # a set that keeps the order
        for name in sorted(topics):
            for paragraph in re.split(r"\n\s*\n", topics[name]):
                paragraphs[tuple(re.findall(r"\w+|[^\w\s]", paragraph.lower()))] = None
        for index, words in enumerate(filter(None, paragraphs)):
            if split == {8: "val", 9: "test"}.get(index // 10 % 10, "train"):
                yield list(words)


def load(source: Source, *, name: str, limit: int | None, data_root: Path) -> Corpus:
    """Returns the tokenised ``source``, from the cache ``data_root/text`` or else to be found there next time.

    Args:
        name: of the data set, for the cache file's name.
        limit: largest size of the vocabulary, ``<unk>`` and ``<eos>`` included; None: every word of the
            training split.

    Raises:
        ConfigError: from the source, or when the cache cannot be written.
    """
    key = hashlib.blake2b(f"{_CACHE_FORMAT} {source.key} {limit}".encode(), digest_size=8).hexdigest()
    cache = data_root / "text" / f"{name}-{key}.pt"
    saved = _read(cache)
    if saved is None:
        saved = tokenise(source, limit)
        _write(cache, saved)
    return Corpus(saved["vocabulary"], {split: saved["streams"][split].long() for split in SPLITS})


def tokenise(source: Source, limit: int | None = None) -> dict:
    """Returns ``{"vocabulary": list of words, "streams": {split: int32 [tokens]}}``; every line ends in ``<eos>``.

    The vocabulary is the training split's, after ``<unk>`` and ``<eos>`` by falling frequency; words outside it
    are ``<unk>``.
    """
    counts = Counter(word for line in source.lines("train") for word in line)
    words = [word for word, _ in counts.most_common() if word not in (UNK, EOS)]
    vocabulary = [UNK, EOS, *words[: None if limit is None else limit - 2]]
    number = {word: index for index, word in enumerate(vocabulary)}
    streams = {}
    for split in SPLITS:
        ids = (number.get(word, 0) for line in source.lines(split) for word in (*line, EOS))
        streams[split] = torch.tensor(list(ids), dtype=torch.int32)
    return {"vocabulary": vocabulary, "streams": streams}


def _read(path: Path) -> dict | None:
    """Returns what a cache file holds, or None if there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        log.warning("%s is damaged (%s): tokenising again", path, error)
        return None


def _write(path: Path, content: dict) -> None:
    """Writes a cache file whole or not at all: ranks that start together may all write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            torch.save(content, file)
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"data_root={path.parent.parent}: cannot be written ({error})") from error
