"""What is in a data set, as one short text: equal fingerprints, equal data.

A run's identity holds it, so that a record is never returned, nor a checkpoint continued, for other data.
"""

import hashlib
import importlib.util
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from koala.data import files as local
from koala.data.spec import ImageSpec, Spec, TextSpec, spec_of
from koala.errors import ConfigError

# The files in which the embedded sets come: they change with scikit-learn's and Python's versions.
EMBEDDED = {ImageSpec: ("sklearn", "datasets/data/digits.csv.gz"), TextSpec: ("pydoc_data", "topics.py")}

TIME_STEP = 2.0  # seconds: the coarsest of a file's times, FAT's

Named = list[tuple[str, Path]]


def fingerprint(cfg: Mapping[str, Any] | Spec, data_root: str | Path = "data") -> str:
    """Returns ``sha256:`` and a digest of the content of a local or embedded set, or ``hub:<id>@<revision>``; of a set
    of the hub or of a copy of it also its configuration.

    The files of a local tokenizer are part of the content.

    A local set may be moved: only what of its names decides its samples (splits, classes) is part of the digest.

    Args:
        cfg: a file of configs/data, or what was read of it.

    Raises:
        ConfigError: for a bad key or value, or missing files.
    """
    spec = cfg if isinstance(cfg, Spec) else spec_of(cfg)
    parts, files = [], _files(spec)
    if spec.path is None and spec.hub is not None and not files:
        parts.append(f"hub:{spec.hub}@{spec.hub_revision or 'main'}")
    if spec.path is None and spec.hub_config:
        parts.append(f"config:{spec.hub_config}")
    tokenizer = getattr(spec, "tokenizer", None)
    if tokenizer and (folder := Path(tokenizer)).is_dir():
        kinds = ("*.json", "*.txt", "*.model")  # not a model's weights, which may lie there as well
        files += [(f"tokenizer/{file.name}", file) for kind in kinds for file in sorted(folder.glob(kind))]
    if files:
        # What is embedded is small: it is read each time, so that naming a run writes nothing.
        embedded = spec.path is None and spec.hub is None
        parts.append(_content(files) if embedded else digest(files, Path(data_root)))
    return " ".join(parts)


def _files(spec: Spec) -> Named:
    """The files of a local or embedded set in the order in which they are read, with the names that have a meaning."""
    if spec.path is not None and isinstance(spec, TextSpec):
        return list(local.text_files(spec.path).items())
    if spec.path is not None:
        return [(split if file.suffix == ".parquet" else f"{split}/{file.parent.name}/{file.name}", file)
                for split, files in local.split_files(spec).items() for file in files]  # fmt: skip
    if spec.hub is None:
        package, file = EMBEDDED[type(spec)]
        return [(file, Path(importlib.util.find_spec(package).origin).parent / file)]
    copy = Path(spec.hub)  # perhaps a local copy of a hub repository
    return [(str(file.relative_to(copy)), file) for file in sorted(copy.rglob("*")) if file.is_file()]


def copy_of(spec: Spec, data_root: Path) -> Path:
    """The folder for the data sets' library's copy of a local set; it alone would go by names and times of files."""
    return data_root / "huggingface" / _sha256(fingerprint(spec, data_root).encode())[:12]


def digest(files: Named, data_root: Path) -> str:
    """Returns ``sha256:`` and a digest of the content of ``files``.

    It is kept below ``data_root`` by their sizes, times and inodes, so that large ones are read once. A file's times
    have steps: what was changed a moment ago could be changed again within the same one, and is not kept.

    Raises:
        ConfigError: a file cannot be read, such as a folder where an image should be, or a link to nothing.
    """
    try:
        return _kept_digest(files, data_root)
    except OSError as error:
        raise ConfigError(error.filename, None, f"cannot be read: {error.strerror}") from error


def _kept_digest(files: Named, data_root: Path) -> str:
    stats = [(name, str(file.absolute()), file.stat()) for name, file in files]
    # Whoever writes a file may set its modification time (cp -p, rsync, git); nobody sets its change time.
    states = [
        (name, path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)
        for name, path, stat in stats
    ]
    kept = data_root / "fingerprints" / _sha256(repr(states).encode())
    with suppress(OSError, ValueError):  # none, or not one of ours
        content = kept.read_text("ascii")
        if len(bytes.fromhex(content)) == hashlib.sha256().digest_size:
            return f"sha256:{content}"
    content = _content(files)
    if time.time() - max((stat.st_ctime for _, _, stat in stats), default=0.0) < TIME_STEP:
        return content
    with suppress(OSError):  # a folder that cannot be written costs reading the set again, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(content.removeprefix("sha256:"), "ascii")
        partial.replace(kept)
    return content


def _content(files: Named) -> str:
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(_of_file, (file for _, file in files)))
    return "sha256:" + _sha256(repr([(name, text) for (name, _), text in zip(files, contents, strict=True)]).encode())


def _of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
