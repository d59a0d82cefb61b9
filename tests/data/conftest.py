"""An image set on disk, and text."""

import pytest

from tests.data.image_sets import write_parquet


@pytest.fixture
def folder(tmp_path):
    """24 training images in two files, 7 of test in one; image k is sample_image(k) with label k % 3."""
    write_parquet(tmp_path / "set/train-00000-of-00002.parquet", range(10))
    write_parquet(tmp_path / "set/train-00001-of-00002.parquet", range(10, 24))
    write_parquet(tmp_path / "set/deeper/test-00000-of-00001.parquet", range(100, 107))
    return tmp_path / "set"


@pytest.fixture
def write_text(tmp_path):
    """``write_text(train, valid, test, names=...) -> Path``: the folder of three files; text, or bytes as they are."""

    def write(*texts, names=("train.txt", "valid.txt", "test.txt")):
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        for name, text in zip(names, texts, strict=True):
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return write
