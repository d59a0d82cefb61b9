"""Which files of a local folder are a data set's."""

from pathlib import Path

from koala.data.spec import ImageSpec, LabelledSpec
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


def split_folder(spec: LabelledSpec) -> str:
    """What a folder of samples with classes may hold, in words."""
    train, test = spec.train_split, spec.test_split
    columns = ", ".join(spec.columns.values())
    tables = f"a folder of {train}*.parquet and {test}*.parquet with the columns {columns}"
    return f"{tables}, or of {train}/<class>/ and {test}/<class>/ with images" if _has_folders(spec) else tables


def split_files(spec: LabelledSpec) -> dict[str, list[Path]]:
    """Returns the files of "train" and "test" below ``spec.path``: parquet files whose names begin with the
    split's, or else, of images, everything in folders called like the splits.

    Raises:
        ConfigError: if the folder is missing, empty or lacks a split.
    """
    root, names = Path(spec.path).expanduser(), {"train": spec.train_split, "test": spec.test_split}
    if not root.is_dir():
        raise ConfigError("data.path", spec.path, "no such folder", valid=split_folder(spec))
    files = {split: sorted(root.rglob(f"{name}*.parquet")) for split, name in names.items()}
    if not any(files.values()) and _has_folders(spec):
        files = {split: sorted((root / name).glob("[!.]*/[!.]*")) for split, name in names.items()}
    for split, name in names.items():
        if not files[split]:
            reason = f"has no {name} split, which data.{split}_split names"
            raise ConfigError("data.path", spec.path, reason, valid=split_folder(spec))
    return files


def _has_folders(spec: LabelledSpec) -> bool:
    return isinstance(spec, ImageSpec)  # a folder for each class is usual for images alone
