"""What is in a data set, as one short text: equal fingerprints, equal data.

A run's identity holds it, so that a record is never returned, nor a checkpoint continued, for other data.
"""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from koala.data import corpus, sources
from koala.data.spec import ImageSpec, TextSpec, spec_of

# The files in which the embedded sets come: they change with scikit-learn's and Python's versions.
EMBEDDED = {ImageSpec: ("sklearn", "datasets/data/digits.csv.gz"), TextSpec: ("pydoc_data", "topics.py")}

Named = list[tuple[str, Path]]


def fingerprint(cfg: Mapping[str, Any] | ImageSpec | TextSpec, data_root: str | Path = "data") -> str:
    """Returns ``sha256:`` and a digest of the content of a local or embedded set, or ``hub:<id>@<revision>``.

    The files of a local tokenizer are part of the content.

    A local set may be moved: only what of its names decides its samples (splits, classes) is part of the digest.

    Args:
        cfg: a file of configs/data, or what was read of it.

    Raises:
        ConfigError: for a bad key or value, or missing files.
    """
    spec = cfg if isinstance(cfg, (ImageSpec, TextSpec)) else spec_of(cfg)
    parts, files = [], _files(spec)
    if spec.path is None and spec.hub is not None and not files:
        parts.append(f"hub:{spec.hub}@{spec.hub_revision or 'main'}")
    if isinstance(spec, TextSpec) and spec.tokenizer and (folder := Path(spec.tokenizer)).is_dir():
        files += [
            (f"tokenizer/{file.name}", file) for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.txt"))
        ]
    if files:
        # What is embedded is small: it is read each time, so that naming a run writes nothing.
        embedded = spec.path is None and spec.hub is None
        parts.append(_content(files) if embedded else digest(files, Path(data_root)))
    return " ".join(parts)


def _files(spec: ImageSpec | TextSpec) -> Named:
    """The files of a local or embedded set in the order in which they are read, with the names that have a meaning."""
    if spec.path is not None and isinstance(spec, TextSpec):
        return list(corpus.local_files(spec.path).items())
    if spec.path is not None:
        return [(split if file.suffix == ".parquet" else f"{split}/{file.parent.name}/{file.name}", file)
                for split, files in sources.local_files(spec).items() for file in files]  # fmt: skip
    if spec.hub is None:
        package, file = EMBEDDED[type(spec)]
        return [(file, Path(importlib.util.find_spec(package).origin).parent / file)]
    copy = Path(spec.hub)  # perhaps a local copy of a hub repository
    return [(str(file.relative_to(copy)), file) for file in sorted(copy.rglob("*")) if file.is_file()]


def digest(files: Named, data_root: Path) -> str:
    """Returns ``sha256:`` and a digest of the content of ``files``.

    It is kept below ``data_root`` by their sizes and times, so that large ones are read once.
    """
    stats = [(name, str(file.absolute()), file.stat()) for name, file in files]
    known_by = _sha256(repr([(name, path, stat.st_size, stat.st_mtime_ns) for name, path, stat in stats]).encode())
    kept = data_root / "fingerprints" / known_by
    with suppress(OSError, ValueError):  # none, or not one of ours
        found = kept.read_text("ascii")
        if len(bytes.fromhex(found)) == hashlib.sha256().digest_size:
            return f"sha256:{found}"
    content = _content(files)
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
