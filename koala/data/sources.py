"""Where encoded images come from: the Hugging Face hub, or a local folder of parquet files or of images."""

from pathlib import Path

from koala.data.encoded import Encoded, Files, Rows
from koala.data.files import image_files, image_folder
from koala.data.spec import ImageSpec
from koala.data.tables import hub_table, parquet_table, wanted_columns
from koala.errors import ConfigError


def encoded(spec: ImageSpec, data_root: Path) -> dict[str, Encoded]:
    """Returns the splits "train" and "test", not yet decoded.

    The hub's files are kept where HF keeps them (HF_HOME); Arrow copies of local files below ``data_root``.

    Raises:
        ConfigError: the set cannot be had, or its columns or labels are not those of ``spec``.
    """
    splits = _of_folder(spec, data_root) if spec.path else _of_hub(spec, data_root)
    for split, images in splits.items():
        if len(images.labels) == 0:
            raise ConfigError("data", spec.name, f"the {split} split is empty")
        check_classes(spec, images.labels.min().item(), images.labels.max().item(), images.classes)
    return splits


def check_classes(spec: ImageSpec, lowest: int, highest: int, classes: int | None = None) -> None:
    """Raises ConfigError unless ``spec.classes`` agrees with the labels and with the set's number, if it has one."""
    if lowest < 0 or highest >= spec.classes:
        raise ConfigError("data.classes", spec.classes, f"the set's labels go from {lowest} to {highest}")
    if classes not in (None, spec.classes):
        raise ConfigError("data.classes", spec.classes, f"the set has {classes}", valid=str(classes))


def _of_folder(spec: ImageSpec, data_root: Path) -> dict[str, Encoded]:
    """The splits of a local folder: parquet files, or images in a folder for each class."""
    files = image_files(spec)
    if files["train"][0].suffix == ".parquet":
        return {split: Rows(parquet_table(paths, spec, data_root), spec, split) for split, paths in files.items()}
    names = sorted({file.parent.name for file in files["train"] + files["test"]})
    return {split: Files(paths, names) for split, paths in files.items()}


def _of_hub(spec: ImageSpec, data_root: Path) -> dict[str, Encoded]:
    """The splits of a set of the hub, or of a local copy of its repository."""
    splits = {"train": spec.train_split, "test": spec.test_split}
    wanted, instead = wanted_columns(spec), image_folder(spec)
    return {
        split: Rows(hub_table(spec, name, wanted, instead, data_root), spec, split) for split, name in splits.items()
    }
