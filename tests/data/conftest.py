"""An image set on disk."""

import pytest

from tests.data.image_sets import write_parquet


@pytest.fixture
def folder(tmp_path):
    """24 training images in two files, 7 of test in one; image k is sample_image(k) with label k % 3."""
    write_parquet(tmp_path / "set/train-00000-of-00002.parquet", range(10))
    write_parquet(tmp_path / "set/train-00001-of-00002.parquet", range(10, 24))
    write_parquet(tmp_path / "set/deeper/test-00000-of-00001.parquet", range(100, 107))
    return tmp_path / "set"
