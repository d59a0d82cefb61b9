"""Where encoded images come from: the Hugging Face hub, or a local folder of parquet files or of images."""

from pathlib import Path
from typing import TYPE_CHECKING

from koala.data.encoded import Encoded, Files, Rows
from koala.data.spec import ImageSpec
from koala.errors import ConfigError

if TYPE_CHECKING:  # half a second to import, and needless when the images are cached
    from datasets import Dataset


def encoded(spec: ImageSpec, data_root: Path) -> dict[str, Encoded]:
    """Returns the splits "train" and "test", not yet decoded.

    The hub's files are kept where HF keeps them (HF_HOME); Arrow copies of local parquet files below ``data_root``.

    Raises:
        ConfigError: the set cannot be had, or its columns or labels are not those of ``spec``.
    """
    splits = _folder(spec, data_root) if spec.path else _rows(_hub(spec), spec)
    for images in splits.values():
        if len(images.labels) == 0:
            raise ConfigError(f"data.path={spec.path}, data.hub={spec.hub}: the set is empty")
        check_classes(spec, images.labels.min().item(), images.labels.max().item(), images.classes)
    return splits


def check_classes(spec: ImageSpec, lowest: int, highest: int, classes: int | None = None) -> None:
    """Raises ConfigError unless ``spec.classes`` is what labels and, where it is known, the set's own number say."""
    if lowest < 0 or highest >= spec.classes:
        raise ConfigError(f"data.classes={spec.classes}: the set's labels go from {lowest} to {highest}")
    if classes not in (None, spec.classes):
        raise ConfigError(f"data.classes={spec.classes}: the set has {classes}")


def local_files(spec: ImageSpec) -> dict[str, list[Path]]:
    """Returns the files of "train" and "test" below ``spec.path``: parquet files whose names begin with the
    split's, or else everything in folders called like the splits.

    Raises:
        ConfigError: if the folder is missing, empty or lacks a split.
    """
    root, names = Path(spec.path).expanduser(), {"train": spec.train_split, "test": spec.test_split}
    if not root.is_dir():
        raise ConfigError(f"data.path={spec.path}: there is no such folder")
    parquet = {split: sorted(root.rglob(f"{name}*.parquet")) for split, name in names.items()}
    folders = {split: sorted((root / name).glob("*/[!.]*")) for split, name in names.items()}
    found = parquet if any(parquet.values()) else folders
    for split, name in names.items():
        if not found[split]:
            raise ConfigError(
                f"data.path={spec.path}: no {name} images there; wanted: files {name}*.parquet with the "
                f"columns {spec.image_column}, {spec.label_column}, or folders {name}/<class>/ of images"
            )
    return found


def _folder(spec: ImageSpec, data_root: Path) -> dict[str, Encoded]:
    files = local_files(spec)
    everything = files["train"] + files["test"]
    if files["train"][0].suffix != ".parquet":
        names = sorted({file.parent.name for file in everything})
        return {split: Files(paths, names) for split, paths in files.items()}
    import datasets

    for file in everything:
        _check_parquet(file, spec)
    names = {split: [str(file) for file in paths] for split, paths in files.items()}
    try:
        tables = datasets.load_dataset("parquet", data_files=names, cache_dir=str(data_root / "huggingface"))
    except datasets.exceptions.DatasetGenerationError as error:
        if getattr(error.__cause__, "errno", None):  # the operating system's: nothing is wrong with the files
            raise _no_room(data_root, error.__cause__) from error
        for file in everything:
            _check_parquet(file, spec, whole=True)
        raise ConfigError(f"data.path={spec.path}: cannot be read: {error.__cause__ or error}") from error
    except OSError as error:
        raise _no_room(data_root, error) from error
    return _rows(tables, spec)


def _no_room(data_root: Path, error: OSError) -> ConfigError:
    return ConfigError(f"data_root={data_root}: data cannot be kept there: {error}")


def _check_parquet(file: Path, spec: ImageSpec, *, whole: bool = False) -> None:
    """Reads the file's footer, or all of it, so that a damaged or foreign file is told by its name."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        columns = opened.schema_arrow.names
        for _ in opened.iter_batches() if whole else ():
            pass
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data.path={spec.path}: {file.name} is not a readable parquet file: {error}") from error
    _check_columns(columns, spec, file.name)


def _check_columns(columns: list[str], spec: ImageSpec, where: str) -> None:
    wanted = [spec.image_column, spec.label_column]
    if not set(wanted) <= set(columns):
        raise ConfigError(
            f"data.path={spec.path}, data.hub={spec.hub}: {where} has the columns {', '.join(columns)}; "
            f"wanted: {', '.join(wanted)} (data.image_column, data.label_column)"
        )


def _hub(spec: ImageSpec) -> dict[str, "Dataset"]:
    import datasets

    splits = {"train": spec.train_split, "test": spec.test_split}
    revision = None if Path(spec.hub).is_dir() else spec.hub_revision
    try:
        loaded = datasets.load_dataset(spec.hub, spec.hub_config, revision=revision, split=list(splits.values()))
    except (OSError, ValueError) as error:  # unreachable, unknown, gated; or no such split
        raise ConfigError(
            f"data.hub={spec.hub}: cannot be had from the hub: {str(error).splitlines()[0]}; pass "
            f"data.path=<folder of {spec.train_split}*.parquet, {spec.test_split}*.parquet with the columns "
            f"{spec.image_column}, {spec.label_column}, or of {spec.train_split}/<class>/, {spec.test_split}/<class>/>"
        ) from error
    return dict(zip(splits, loaded, strict=True))


def _rows(tables: dict[str, "Dataset"], spec: ImageSpec) -> dict[str, Encoded]:
    for table in tables.values():
        _check_columns(table.column_names, spec, "the set")
    return {split: Rows(table, spec, split) for split, table in tables.items()}
