"""Where text comes from: local files, the Hugging Face hub, or the documentation that is embedded in Python."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from koala.data import files
from koala.data.spec import TextSpec
from koala.data.tables import hub_table, text_of
from koala.errors import ConfigError

_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Source(Protocol):
    """Text by lines."""

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each line of a split ("train", "val" or "test")."""


class TextFiles:
    """Plain text files of one folder, a sentence or paragraph a line, words separated by white space.

    Raises:
        ConfigError: when the folder or a split's file is missing.
    """

    def __init__(self, folder: str | Path):
        self._files = files.text_files(folder)

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each line; a blank one has none (and still ends in ``<eos>``, as usual for WikiText).

        Raises:
            ConfigError: the file cannot be read, is not UTF-8 or has no words.
        """
        file = self._files[split]
        try:
            text = file.read_text("utf-8-sig")  # Windows puts a mark in front, which is no word
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigError("data.path", file.parent, f"{file.name} is not UTF-8 text ({error})") from error
        if not text.strip():
            raise ConfigError("data.path", file.parent, f"{file.name} has no words")
        # Lines end in \n alone: str.splitlines would also cut at the exotic separators that occur in WikiText.
        return (line.split() for line in text.removesuffix("\n").split("\n"))


class HubText:
    """A text data set of the Hugging Face hub (or a local folder in its format), a line of text a row.

    Its revision may be ``refs/convert/parquet``, for data sets that still ship a loading script.
    """

    def __init__(self, spec: TextSpec, data_root: Path):
        self._spec, self._data_root = spec, data_root

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each row.

        Raises:
            ConfigError: the set cannot be reached or has another form.
        """
        column = self._spec.text_column
        rows = hub_table(
            self._spec, _HUB_SPLITS[split], {"data.text_column": column}, files.TEXT_FOLDER, self._data_root
        )
        return (line.split() for line in text_of(rows, "data.text_column", column, split))


class PythonDocs:
    """The help topics that come with Python (``help("LAMBDA")``): a small real text that is on every machine.

    About 95,000 tokens; the text varies a little with Python's version, so compare perplexities under one version
    only. A line is a paragraph in lower case, punctuation apart. Topics quote each other: a paragraph counts where
    it occurs first, so that no test paragraph is seen in training. Of every 100 paragraphs, topics in alphabetical
    order, 80 are for training, then 10 for validation and 10 for testing.
    """

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


def source(spec: TextSpec, data_root: Path) -> Source:
    """The text of a data set: local files before the hub before the embedded one."""
    if spec.path is not None:
        return TextFiles(spec.path)
    if spec.hub is not None:
        return HubText(spec, data_root)
    return PythonDocs()
