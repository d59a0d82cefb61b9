"""Images as they are stored, still encoded, by row: files of a folder, or rows of a table, local or of the hub.

Of a table only the bytes in it are read: a path that stands in it may be anybody's file, and is not opened.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from koala.data.files import split_files
from koala.data.spec import ImageSpec
from koala.data.tables import check_labels, labels_of, split_tables
from koala.errors import ConfigError

if TYPE_CHECKING:  # half a second to import, and needless when the images are cached
    from datasets import Dataset


class Encoded:
    """Images with their ``labels``, int64 [N]; ``classes`` where the set itself says how many there are."""

    labels: Tensor
    classes: int | None

    def bytes_of(self, row: int) -> bytes:
        """Returns the encoded image of a row, or raises ConfigError if there is none."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        """What to call a row in a message."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> "Encoded":
        """Returns some of the rows."""
        return Chosen(self, rows)


class Files(Encoded):
    """Images in folders that are called as their classes.

    Args:
        names: of all classes, in the order of their numbers.
    """

    def __init__(self, files: list[Path], names: list[str]):
        self._files, self.classes = files, len(names)
        number = {name: index for index, name in enumerate(names)}
        self.labels = torch.tensor([number[file.parent.name] for file in files])

    def bytes_of(self, row: int) -> bytes:
        """Returns the content of a file."""
        try:
            return self._files[row].read_bytes()
        except OSError as error:
            raise ConfigError(self.name(row), None, f"cannot be read: {error}") from error

    def name(self, row: int) -> str:
        """The file's path."""
        return str(self._files[row])


class Rows(Encoded):
    """Rows of an HF data set, by the columns that ``spec`` names.

    Raises:
        ConfigError: the columns hold other things than encoded images and whole numbers.
    """

    def __init__(self, table: "Dataset", spec: ImageSpec, split: str):
        import pyarrow as pa

        images = table.data.column(spec.image_column)
        if not pa.types.is_struct(images.type) or images.type.get_field_index("bytes") < 0:
            reason = f"has {images.type} values in the {split} split"
            valid = "a column of {bytes, path} of encoded images"
            raise ConfigError("data.image_column", spec.image_column, reason, valid=valid)
        self._table, self._column, self._split = table, spec.image_column, split
        self._set = f"data.path={spec.path}" if spec.path else f"data.hub={spec.hub}"
        self.labels, self.classes = labels_of(table, spec, split)

    def bytes_of(self, row: int) -> bytes:
        """Returns the bytes that stand in a row."""
        image = self._table.data.column(self._column)[row].as_py() or {}
        if not image.get("bytes"):
            path = image.get("path")
            held = f"only the path {path!r} of a file, which is not opened" if path else "none"
            raise ConfigError(self.name(row), None, f"there is {held}", valid="the bytes of an image")
        return image["bytes"]

    def name(self, row: int) -> str:
        """The row's number in its split."""
        return f"{self._set}: row {row} of the {self._split} split"


class Chosen(Encoded):
    """Some rows of other images, under the names that they have there."""

    def __init__(self, images: Encoded, rows: Tensor):
        self._images, self._rows = images, rows
        self.labels, self.classes = images.labels[rows], images.classes

    def bytes_of(self, row: int) -> bytes:
        """Returns the encoded image of a chosen row."""
        return self._images.bytes_of(int(self._rows[row]))

    def name(self, row: int) -> str:
        """The row's name among all."""
        return self._images.name(int(self._rows[row]))


def encoded(spec: ImageSpec, data_root: Path) -> dict[str, Encoded]:
    """Returns the splits "train" and "test", not yet decoded.

    The hub's files are kept where HF keeps them (HF_HOME); Arrow copies of local files below ``data_root``.

    Raises:
        ConfigError: the set cannot be had, or its columns or labels are not those of ``spec``.
    """
    files = split_files(spec) if spec.path else {}
    if files and files["train"][0].suffix != ".parquet":
        names = sorted({file.parent.name for file in files["train"] + files["test"]})
        splits = {split: Files(paths, names) for split, paths in files.items()}
    else:
        splits = {split: Rows(table, spec, split) for split, table in split_tables(spec, data_root).items()}
    for split, images in splits.items():
        check_labels(spec, split, images.labels, images.classes)
    return splits
