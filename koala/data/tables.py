"""Tables of the data sets' library: parquet files and sets of the Hugging Face hub, of which only wanted columns are
read; what else stands in the files may be anything, and differ from split to split."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, from_numpy

from koala.data.files import split_files, split_folder
from koala.data.fingerprint import copy_of
from koala.data.spec import LabelledSpec, Spec
from koala.errors import ConfigError, first_line

if TYPE_CHECKING:  # half a second to import, and needless when a set is cached
    from datasets import Dataset


def check_columns(columns: Sequence[str], wanted: dict[str, str], key: str, value: object, where: str) -> None:
    """Raises ConfigError unless the ``wanted`` columns, {key of the configuration: name}, are among ``columns``."""
    for config_key, name in wanted.items():
        if name not in columns:
            raise ConfigError(config_key, name, f"{key}={value}: {where} has no such column", valid=columns)


def split_tables(spec: LabelledSpec, data_root: Path) -> "dict[str, Dataset]":
    """The rows of "train" and "test": of local parquet files, of a set of the hub or of a local copy of its repository.

    Raises:
        ConfigError: they cannot be had, or lack a column.
    """
    if spec.path:
        return {split: parquet_table(files, spec, data_root) for split, files in split_files(spec).items()}
    names = {"train": spec.train_split, "test": spec.test_split}
    return {split: hub_table(spec, name, spec.columns, split_folder(spec), data_root) for split, name in names.items()}


def labels_of(table: "Dataset", spec: LabelledSpec, split: str) -> tuple[Tensor, int | None]:
    """The labels of a table's rows, int64 [N], and the number of classes where the set itself says it.

    Raises:
        ConfigError: they are no whole numbers.
    """
    import pyarrow as pa

    labels = table.data.column(spec.label_column)
    if not pa.types.is_integer(labels.type) or labels.null_count:
        held = f"{labels.null_count} nulls" if pa.types.is_integer(labels.type) else f"{labels.type} values"
        reason = f"has {held} in the {split} split"
        raise ConfigError("data.label_column", spec.label_column, reason, valid="whole numbers from 0")
    numbers = from_numpy(labels.to_numpy().astype("int64"))
    return numbers, getattr(table.features[spec.label_column], "num_classes", None)


def text_of(table: "Dataset", key: str, name: str, split: str) -> list[str]:
    """A column of text, which ``key`` of the configuration names.

    Raises:
        ConfigError: it holds other values, or rows without one.
    """
    import pyarrow as pa

    column = table.data.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) or column.null_count:
        held = f"{column.null_count} nulls and " if column.null_count else ""
        raise ConfigError(key, name, f"has {held}{column.type} values in the {split} split", valid="a column of text")
    return column.to_pylist()


def check_labels(spec: LabelledSpec, split: str, labels: Tensor, classes: int | None) -> None:
    """Raises ConfigError unless the split has samples, and ``spec.classes`` agrees with the labels and with the set's
    number, if it has one."""
    if not len(labels):
        raise ConfigError("data", spec.name, f"the {split} split is empty")
    lowest, highest = labels.min().item(), labels.max().item()
    if lowest < 0 or highest >= spec.classes:
        raise ConfigError("data.classes", spec.classes, f"the set's labels go from {lowest} to {highest}")
    if classes not in (None, spec.classes):
        raise ConfigError(
            "data.classes", spec.classes, f"the set has {classes}", valid=str(classes) if classes > 1 else "two or more"
        )


def parquet_table(files: list[Path], spec: LabelledSpec, data_root: Path) -> "Dataset":
    """The rows of parquet files, whose copy in Arrow's format is kept below ``data_root``, by the set's content.

    Raises:
        ConfigError: a file is damaged, lacks a column, or there is no room for the copy.
    """
    datasets, features = _library(), _features(files, spec)
    try:
        return datasets.load_dataset(
            "parquet",
            data_files=[str(file) for file in files],
            split="train",  # the library's name for all of them
            columns=list(features),
            features=features,
            cache_dir=str(copy_of(spec, data_root)),
        )
    except (datasets.exceptions.DatasetsError, OSError) as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None):  # the operating system's: nothing is wrong with the files
            raise ConfigError("data_root", data_root, f"data cannot be kept there: {cause}") from error
        for file in files:
            _check_readable(file, spec)
        raise ConfigError("data.path", spec.path, f"cannot be read: {first_line(cause)}") from error


def _features(files: list[Path], spec: LabelledSpec) -> dict:
    """The types of the columns: those of the first file; labels as wide as whole numbers are."""
    import datasets
    import pyarrow as pa

    schemas = [_schema(file, spec) for file in files]
    columns = [schemas[0].field(name) for name in spec.columns.values()]
    features = datasets.Features.from_arrow_schema(pa.schema(columns, metadata=schemas[0].metadata))
    if pa.types.is_integer(columns[-1].type) and not isinstance(features[spec.label_column], datasets.ClassLabel):
        features[spec.label_column] = datasets.Value("int64")
    return features


def _schema(file: Path, spec: LabelledSpec):
    """The columns of a parquet file, from its footer, so that a damaged or foreign file is named."""
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, spec, error) from error
    check_columns(schema.names, spec.columns, "data.path", spec.path, file.name)
    return schema


def _check_readable(file: Path, spec: LabelledSpec) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        for _ in parquet.ParquetFile(file).iter_batches(columns=list(spec.columns.values())):
            pass
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, spec, error) from error


def _unreadable(file: Path, spec: LabelledSpec, error: Exception) -> ConfigError:
    return ConfigError("data.path", spec.path, f"{file.name} is not a readable parquet file: {first_line(error)}")


def commit_of(spec: Spec) -> str | None:
    """The commit of a set of the hub that this process reads, None where there is no hub or it does not say."""
    if spec.path is not None or spec.hub is None or Path(spec.hub).is_dir():
        return None
    return _commit(spec.hub, spec.hub_config, spec.hub_revision)


@functools.cache  # a branch may move on: every split is of one commit
def _commit(hub: str, config: str | None, revision: str | None) -> str | None:
    digest = _library().load_dataset_builder(path=hub, name=config, revision=revision).hash
    return digest if re.fullmatch("[0-9a-f]{40}", digest or "") else None


def hub_table(spec: Spec, split: str, wanted: dict[str, str], instead: str, data_root: Path) -> "Dataset":
    """A split of a set of the hub, or of a local copy of its repository.

    Args:
        wanted: {key of the configuration: name} of the columns.
        instead: what ``data.path`` may be where the hub cannot be reached.

    Raises:
        ConfigError: it cannot be reached, or has no such configuration, split or column.
    """
    datasets, local = _library(), Path(spec.hub).is_dir()
    options = {"path": spec.hub, "name": spec.hub_config}
    if local:
        options["cache_dir"] = str(copy_of(spec, data_root))
    try:
        if not local:
            options["revision"] = commit_of(spec) or spec.hub_revision
        if hasattr(datasets.load_dataset_builder(**options).config, "columns"):  # parquet, which has columns to skip
            names = datasets.load_dataset(**options, split=split, streaming=True).column_names
            options["columns"] = list(wanted.values())
            check_columns(names or options["columns"], wanted, "data.hub", spec.hub, f"its {split} split")
        table = datasets.load_dataset(**options, split=split)
    except ConfigError:
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        vague = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its cause says what is wrong
        reason = f"cannot be loaded ({first_line(error.__cause__ if vague else error)})"
        raise ConfigError("data.hub", spec.hub, reason, valid=f"data.path={instead}") from error
    check_columns(table.column_names, wanted, "data.hub", spec.hub, f"its {split} split")
    return table


def _library():
    """The data sets' library, without its log: what goes wrong becomes one message."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets
