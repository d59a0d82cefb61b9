"""Where encoded images come from: the Hugging Face hub, or a local folder of parquet files or of images."""

from pathlib import Path

from koala.data.encoded import Encoded, Files, Rows
from koala.data.files import split_files
from koala.data.spec import ImageSpec
from koala.data.tables import check_labels, split_tables


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
