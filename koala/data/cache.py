"""Decoded data kept on disk for the next run.

A file is safetensors (tensors and text, so loading runs no code), written beside its place and then moved there,
with a checksum of all that is in it: it is complete, or made again. One process of a machine makes
it while the others wait.
"""

import logging
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from koala.errors import ConfigError
from koala.lock import Lock

log = logging.getLogger(__name__)

CHECKSUM = "crc32"


class Kept(NamedTuple):
    """What a cache file holds."""

    tensors: dict[str, Tensor]
    notes: dict[str, str]


class _Damaged(Exception):
    """There is a file, but it is not what was written, or somebody else's."""


def cached(file: Path, make: Callable[[], Kept]) -> Kept:
    """Returns what ``file`` holds; if there is none, or it is damaged, what ``make`` returns, kept there from then on.

    Permissions follow the umask, and a whole file is only read: so others may share the folder, also without writing.

    Raises:
        ConfigError: the folder or a file in it cannot be read or written, such as on a full disk; no part is left.
    """
    try:
        with suppress(FileNotFoundError, _Damaged):
            return _read(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with Lock(file.with_suffix(".lock")):
            try:
                return _read(file)  # another process may have made it meanwhile
            except FileNotFoundError:
                pass
            except _Damaged as reason:
                log.warning("%s is damaged or another file (%s): rebuilding it", file, reason)
            kept = make()
            _write(file, kept)
            return kept
    except OSError as error:
        raise ConfigError("data_root", file.parent, f"decoded data cannot be kept there: {error}") from error


def _checksum(kept: Kept) -> str:
    total = 0
    for name, tensor in sorted(kept.tensors.items()):
        total = zlib.crc32(repr((name, tensor.dtype, tensor.shape)).encode(), total)
        total = zlib.crc32(tensor.numpy().reshape(-1).view(np.uint8), total)
    notes = sorted((key, value) for key, value in kept.notes.items() if key != CHECKSUM)
    return str(zlib.crc32(repr(notes).encode(), total))


def _write(file: Path, kept: Kept) -> None:
    """Writes `file` completely or not at all."""
    partial = file.with_suffix(".partial")  # the lock's holder's: what a killed run left is overwritten
    try:
        partial.touch()
        as_umask_says = partial.stat().st_mode  # safetensors makes files that only their owner can read
        save_file(kept.tensors, partial, metadata=kept.notes | {CHECKSUM: _checksum(kept)})
        partial.chmod(as_umask_says)
        os.replace(partial, file)
    except SafetensorError as error:  # what it makes of the operating system's errors
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path) -> Kept:
    """What `file` holds, if its checksum says that nothing of it has changed."""
    file.open("rb").close()  # the operating system's refusals as they are: safetensors has one error for all
    try:
        with safe_open(file, framework="pt") as stored:
            kept = Kept({name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {})
    except SafetensorError as error:
        raise _Damaged(error) from error
    if kept.notes.get(CHECKSUM) != _checksum(kept):
        raise _Damaged("its checksum differs")
    return kept
