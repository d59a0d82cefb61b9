"""Where text comes from: local files, the Hugging Face hub, or the documentation that is embedded in Python."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from koala.data.spec import TextSpec
from koala.errors import ConfigError

SPLITS = ("train", "val", "test")
# Names that the common distributions give a split: Mikolov's PTB, WikiText, PyTorch's word-language-model example.
FILES = {
    "train": ("ptb.train.txt", "wiki.train.tokens", "train.txt"),
    "val": ("ptb.valid.txt", "wiki.valid.tokens", "valid.txt"),
    "test": ("ptb.test.txt", "wiki.test.tokens", "test.txt"),
}
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
        self._files = local_files(folder)

    def lines(self, split: str) -> Iterator[list[str]]:
        """Yields the words of each line; a blank one has none (and still ends in ``<eos>``, as usual for WikiText).

        Raises:
            ConfigError: the file cannot be read, is not UTF-8 or has no words.
        """
        file = self._files[split]
        try:
            text = file.read_text("utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"data.path={file.parent}: {file.name} is not UTF-8 text ({error})") from error
        if not text.strip():
            raise ConfigError(f"data.path={file.parent}: {file.name} has no words")
        # Lines end in \n alone: str.splitlines would also cut at the exotic separators that occur in WikiText.
        return (line.split() for line in text.removesuffix("\n").split("\n"))


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


def source(spec: TextSpec) -> Source:
    """The text of a data set: local files before the hub before the embedded one."""
    if spec.path is not None:
        return TextFiles(spec.path)
    if spec.hub is not None:
        return HubText(spec.hub, spec.hub_config, spec.hub_revision, spec.text_column)
    return PythonDocs()
