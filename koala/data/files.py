"""Which files of a local folder are a data set's."""

from pathlib import Path

from koala.data.spec import ImageSpec
from koala.errors import ConfigError

SPLITS = ("train", "val", "test")
# Names that the common distributions give a split: Mikolov's PTB, WikiText, PyTorch's word-language-model example.
TEXTS = {
    "train": ("ptb.train.txt", "wiki.train.tokens", "train.txt"),
    "val": ("ptb.valid.txt", "wiki.valid.tokens", "valid.txt"),
    "test": ("ptb.test.txt", "wiki.test.tokens", "test.txt"),
}
TEXT_FOLDER = "a folder with " + ", ".join(" or ".join(names) for names in TEXTS.values())


def text_files(path: str | Path) -> dict[str, Path]:
    """Returns the text file of each split in a folder.

    Raises:
        ConfigError: the folder or a split's file is missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError("data.path", folder, "no such folder", valid=TEXT_FOLDER)
    files = {}
    for split, names in TEXTS.items():
        candidates = [folder / name for name in names if (folder / name).is_file()]
        if not candidates:
            raise ConfigError("data.path", folder, f"no {split} split", valid=TEXT_FOLDER)
        files[split] = candidates[0]
    return files


def image_folder(spec: ImageSpec) -> str:
    """What a folder of images may hold, in words."""
    train, test = spec.train_split, spec.test_split
    return (
        f"a folder of {train}*.parquet and {test}*.parquet with the columns {spec.image_column}, {spec.label_column}, "
        f"or of {train}/<class>/ and {test}/<class>/ with images"
    )


def image_files(spec: ImageSpec) -> dict[str, list[Path]]:
    """Returns the files of "train" and "test" below ``spec.path``: parquet files whose names begin with the
    split's, or else everything in folders called like the splits.

    Raises:
        ConfigError: if the folder is missing, empty or lacks a split.
    """
    root, names = Path(spec.path).expanduser(), {"train": spec.train_split, "test": spec.test_split}
    if not root.is_dir():
        raise ConfigError("data.path", spec.path, "no such folder", valid=image_folder(spec))
    parquet = {split: sorted(root.rglob(f"{name}*.parquet")) for split, name in names.items()}
    folders = {split: sorted((root / name).glob("*/[!.]*")) for split, name in names.items()}
    files = parquet if any(parquet.values()) else folders
    for split, name in names.items():
        if not files[split]:
            raise ConfigError("data.path", spec.path, f"no {name} images", valid=image_folder(spec))
    return files
