"""Where image sets come from: the Hugging Face hub, a local folder with the same columns, or scikit-learn's
digits.

Nothing is decoded here except the digits.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from koala.data.base import generator
from koala.data.spec import ImageSpec
from koala.errors import ConfigError

if TYPE_CHECKING:  # half a second to import, and needless when the images are cached
    from datasets import Dataset

DIGITS_TEST = 360  # of scikit-learn's 1,797 digits; the set has no test split of its own


def stratified(labels: Tensor, count: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Splits positions 0..N-1 in (the rest, ``count`` chosen ones), both ascending. Every class is
    represented in proportion, to within one sample; the choice depends on ``purpose`` and the labels
    alone."""
    order = torch.randperm(len(labels), generator=generator(purpose))
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    rank_in_class = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    chosen = by_class[((rank_in_class + 0.5) / sizes[labels[by_class]]).argsort(stable=True)[:count]]
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[chosen] = False
    return keep.nonzero().squeeze(1), chosen.sort().values


def carve(labels: Tensor, spec: ImageSpec, batch_size: int) -> tuple[Tensor, Tensor]:
    """Splits the training split in (what is trained on, ``spec.validation`` held out ones), as ``stratified``
    does.

    Raises:
        ConfigError: if what is left has no batch of ``batch_size``.
    """
    left = len(labels) - spec.validation
    if left < 1:
        raise ConfigError(
            f"data.validation={spec.validation}: must be below the {len(labels)} images to train on"
        )
    if not 1 <= batch_size <= left:
        raise ConfigError(
            f"batch_size={batch_size}: data={spec.name} has {left} images to train on; valid: 1 to {left}"
        )
    return stratified(labels, spec.validation, "validation")


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Returns {"train", "test"}: uint8 images [N, 1, 8, 8] and int64 labels [N] of scikit-learn's handwritten
    digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # ink is 0..16
    labels = torch.from_numpy(bunch.target).long()
    train, test = stratified(labels, DIGITS_TEST, "digits test")
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def fingerprint(spec: ImageSpec) -> str:
    """Returns a short hash of where the images come from and how they are decoded; a changed file changes it.

    Raises:
        ConfigError: if ``spec.path`` is not a folder of images.
    """
    if spec.path is None:
        source: object = (spec.hub, spec.hub_revision)
    else:
        stats = [(file.name, file.stat()) for files in local_files(spec).values() for file in files]
        source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    columns, splits = (spec.image_column, spec.label_column), (spec.train_split, spec.test_split)
    key = (source, columns, splits, spec.channels, spec.size)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:12]


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
    folders = {split: sorted((root / name).glob("*/*")) for split, name in names.items()}
    found = parquet if any(parquet.values()) else folders
    for split, name in names.items():
        if not found[split]:
            raise ConfigError(
                f"data.path={spec.path}: no {name} images there; wanted: files {name}*.parquet with the "
                f"columns {spec.image_column}, {spec.label_column}, or folders {name}/<class>/ of images"
            )
    return found


def rows(spec: ImageSpec, data_root: Path) -> dict[str, "Dataset"]:
    """Returns "train" and "test" as HF data sets with the columns "image" (encoded) and "label".

    The hub's files are kept where HF keeps them (HF_HOME); Arrow copies of local ones below ``data_root``.

    Raises:
        ConfigError: if the set cannot be had, or its columns or labels are not those of ``spec``.
    """
    splits = _local(spec, data_root) if spec.path else _hub(spec)
    return {split: _normal_form(table, spec) for split, table in splits.items()}


def labels_of(table: "Dataset") -> Tensor:
    """Returns the labels of ``table``, int64 [N]."""
    return torch.from_numpy(table.with_format("numpy")["label"][:]).long()


def _local(spec: ImageSpec, data_root: Path) -> dict[str, "Dataset"]:
    import datasets

    files, cache = local_files(spec), str(data_root / "huggingface")
    if files["train"][0].suffix != ".parquet":
        folders = {split: str(paths[0].parents[1] / "**") for split, paths in files.items()}
        return datasets.load_dataset("imagefolder", data_files=folders, cache_dir=cache)
    for file in files["train"] + files["test"]:
        _check_parquet(file, spec)
    names = {split: [str(file) for file in paths] for split, paths in files.items()}
    try:
        return datasets.load_dataset("parquet", data_files=names, cache_dir=cache)
    except datasets.exceptions.DatasetGenerationError as error:
        for file in files["train"] + files["test"]:
            _check_parquet(file, spec, whole=True)
        raise ConfigError(f"data.path={spec.path}: cannot be read: {error.__cause__ or error}") from error


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
        raise ConfigError(
            f"data.path={spec.path}: {file.name} is not a readable parquet file: {error}"
        ) from error
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
    try:
        loaded = datasets.load_dataset(spec.hub, revision=spec.hub_revision, split=list(splits.values()))
    except (OSError, ValueError) as error:  # unreachable, unknown, gated; or no such split
        raise ConfigError(
            f"data.hub={spec.hub}: cannot be had from the hub: {str(error).splitlines()[0]}; pass "
            f"data.path=<folder of parquet files with the columns {spec.image_column}, {spec.label_column}>"
        ) from error
    return dict(zip(splits, loaded, strict=True))


def _normal_form(table: "Dataset", spec: ImageSpec) -> "Dataset":
    """Only the two columns, under one name each, the image left encoded."""
    import datasets

    _check_columns(table.column_names, spec, "the set")
    table = table.select_columns([spec.image_column, spec.label_column])
    names = {spec.image_column: "image", spec.label_column: "label"}
    table = table.rename_columns({old: new for old, new in names.items() if old != new})
    labels = labels_of(table)
    if len(labels) == 0:
        raise ConfigError(f"data.path={spec.path}, data.hub={spec.hub}: the set is empty")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= spec.classes:
        raise ConfigError(f"data.classes={spec.classes}: the set's labels go from {low} to {high}")
    return table.cast_column("image", datasets.Image(decode=False))
