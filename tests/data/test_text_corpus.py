"""Vocabularies and token streams: the standard corpora, local files, the hub's format, Python's documentation."""

import pytest
import torch

from koala.data.corpus import HubText, PythonDocs, TextFiles
from koala.data.spec import TextSpec
from koala.data.tokens import EOS, UNK, load, tokenise
from tests.refused import refused

NAMES = {
    "mikolov": ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    "wikitext": ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    "plain": ("train.txt", "valid.txt", "test.txt"),
}
TEXTS = ("the cat sat\non the mat\n", "the dog sat\n", "on the cat\n")


def words(corpus, split):
    return [corpus.vocabulary[index] for index in corpus.streams[split].tolist()]


def kept(folder, root):
    return load(TextSpec(name="mine", kind="text", path=str(folder)), root)


@pytest.mark.parametrize(
    "folder, types, tokens",
    [
        ("ptb", 10_000, {"train": 929_589, "val": 73_760, "test": 82_430}),
        ("wikitext-2", 33_278, {"train": 2_088_628, "val": 217_646, "test": 245_569}),
    ],
)
def test_standard_corpora_have_their_known_sizes(shared, tmp_path, folder, types, tokens):
    source = TextFiles(shared / "data" / folder)
    corpus = kept(shared / "data" / folder, tmp_path)
    assert len(corpus.vocabulary) == len(set(corpus.vocabulary)) == types
    assert {split: len(stream) for split, stream in corpus.streams.items()} == tokens
    for split in tokens:
        read = words(corpus, split)
        expected = [word for line in source.lines(split) for word in (*line, EOS)]
        assert read == expected  # nothing in the held-out splits is outside the vocabulary


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_file_names_of_the_common_distributions(write_text, names):
    corpus = tokenise(TextFiles(write_text(*TEXTS, names=names)))
    assert words(corpus, "train") == ["the", "cat", "sat", EOS, "on", "the", "mat", EOS]
    assert words(corpus, "val") == ["the", UNK, "sat", EOS]
    assert words(corpus, "test") == ["on", "the", "cat", EOS]
    assert corpus.vocabulary == [UNK, EOS, "the", "cat", "sat", "on", "mat"]


def test_a_limited_vocabulary_keeps_the_most_frequent_words(write_text):
    corpus = tokenise(TextFiles(write_text(*TEXTS)), limit=3)
    assert corpus.vocabulary == [UNK, EOS, "the"]
    assert words(corpus, "train") == ["the", UNK, UNK, EOS, UNK, "the", UNK, EOS]


def test_lines_end_at_newlines_only_and_blank_ones_count(write_text, tmp_path):
    train = " = Title = \n \nword\u2028other\x85more\n"
    with refused("data.path", tmp_path / "text", mentions="valid.txt"):
        tokenise(TextFiles(write_text(train, "\n", "word")))
    corpus = tokenise(TextFiles(write_text(train, "word\n\n", "word")))
    assert words(corpus, "train") == ["=", "Title", "=", EOS, EOS, "word", "other", "more", EOS]
    assert words(corpus, "val") == ["word", EOS, EOS]
    assert words(corpus, "test") == ["word", EOS]


def test_the_mark_that_windows_puts_in_front_of_a_text_is_no_word(write_text):
    corpus = tokenise(TextFiles(write_text(*(text.encode("utf-8-sig") for text in TEXTS))))
    assert corpus.vocabulary == tokenise(TextFiles(write_text(*TEXTS))).vocabulary


def test_bad_folders_are_explained(write_text, tmp_path):
    folder = write_text(*TEXTS)
    (folder / "valid.txt").unlink()
    for position in (tmp_path / "nowhere", folder):
        with refused("data.path", position) as caught:
            TextFiles(position)
        assert "ptb.valid.txt or wiki.valid.tokens or valid.txt" in caught.value.valid
    write_text("fine\n", b"\xff\xfe broken\n", "fine\n")
    with refused("data.path", folder, mentions="valid.txt"):
        tokenise(TextFiles(folder))


def test_cache_is_used_and_follows_the_text(write_text, tmp_path, monkeypatch):
    folder, root = write_text(*TEXTS), tmp_path / "cache"
    first = kept(folder, root)
    with monkeypatch.context() as unread:
        unread.setattr(TextFiles, "lines", lambda *_: pytest.fail("tokenised although it is cached"))
        again = kept(folder, root)
    assert again.vocabulary == first.vocabulary and again.streams["val"].dtype is torch.int64
    assert all(torch.equal(again.streams[split], first.streams[split]) for split in first.streams)
    write_text("other words\n", "other\n", "words\n")
    assert words(kept(folder, root), "test") == ["words", EOS]
    assert len(list(root.glob("mine-*.safetensors"))) == 2


def test_python_documentation_is_split_without_overlap():
    source = PythonDocs()
    paragraphs = {split: {tuple(line) for line in source.lines(split)} for split in ("train", "val", "test")}
    assert not paragraphs["train"] & paragraphs["val"] and not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["val"] & paragraphs["test"]
    corpus, again = tokenise(source, 2000), tokenise(PythonDocs(), 2000)
    assert len(corpus.vocabulary) == 2000
    sizes = {split: len(stream) for split, stream in corpus.streams.items()}
    assert sizes["train"] > 40_000 and sizes["val"] > 3_000 and sizes["test"] > 3_000
    assert all(torch.equal(corpus.streams[split], again.streams[split]) for split in sizes)
    assert {"statement", "<eos>", "<unk>", "."} <= set(words(corpus, "train"))


def hub_text(hub, tmp_path, column):
    return HubText(TextSpec(name="mine", kind="text", hub=str(hub), text_column=column), tmp_path / "data")


def test_hub_text_through_datasets(write_text, tmp_path):
    """A local folder in the hub's format takes the path that a hub id takes, without the network."""
    import datasets

    hub = tmp_path / "hub"
    for split, text in zip(("train", "validation", "test"), TEXTS, strict=True):
        rows = datasets.Dataset.from_dict({"sentence": text.splitlines()})
        rows.to_parquet(hub / "data" / f"{split}-00000-of-00001.parquet")
    from_hub = tokenise(hub_text(hub, tmp_path, "sentence"))
    from_files = tokenise(TextFiles(write_text(*TEXTS)))
    assert from_hub.vocabulary == from_files.vocabulary
    assert all(words(from_hub, split) == words(from_files, split) for split in ("train", "val", "test"))
    with refused("data.text_column", "text", ("sentence",)):
        tokenise(hub_text(hub, tmp_path, "text"))
    for rows in ([1, 2], ["a", None]):
        for split in ("train", "validation", "test"):
            datasets.Dataset.from_dict({"sentence": rows}).to_parquet(hub / f"data/{split}-00000-of-00001.parquet")
        with refused("data.text_column", "sentence"):
            tokenise(hub_text(hub, tmp_path, "sentence"))


def test_an_unreachable_hub_is_bad_input(tmp_path):
    with refused("data.hub", "nobody/nothing") as caught:
        tokenise(hub_text("nobody/nothing", tmp_path, "text"))
    assert "data.path" in caught.value.valid
