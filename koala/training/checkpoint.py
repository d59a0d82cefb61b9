"""Checkpoints of a run: written whole or not at all, checked when read, tensors and plain data only.

A file is named `step-<step>-<sha256, 16 digits>.pt`: the name says what the content must hash to, so one atomic rename
publishes file and checksum together. The last two are kept; a torn or corrupt one is reported and skipped.
"""

import hashlib
import io
import pickle
import re
import warnings
from pathlib import Path

import torch

from koala.errors import ConfigError
from koala.records import write_atomically

FORMAT = 1
KEEP = 2
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


def _files(folder: Path) -> list[tuple[int, str, Path]]:
    """(step, checksum, path) of every checkpoint, newest first."""
    found = [(match, path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), match[2], path) for match, path in found), reverse=True)


def exists(folder: Path) -> bool:
    """Whether `folder` holds any checkpoint, sound or not."""
    return bool(_files(folder))


def save(folder: Path, step: int, state: dict) -> Path:
    """Writes `state` (tensors, numbers, strings, lists, dicts) as the checkpoint of `step` and drops older ones.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "step": step, **state}, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    write_atomically(path, lambda file: file.write(content))
    for _, _, old in [entry for entry in _files(folder) if entry[2] != path][KEEP - 1 :]:
        old.unlink(missing_ok=True)
    for torn in folder.glob(".step-*.tmp"):
        torn.unlink(missing_ok=True)  # a writer was killed; the run's lock says that no other is at work
    return path


def load(folder: Path, device: torch.device | str = "cpu") -> dict | None:
    """The newest sound checkpoint in `folder`, or None when there is none at all.

    Raises:
        ConfigError: a file is sound but holds code (which is not loaded), is no checkpoint of ours or of
            a later format; or every checkpoint is corrupt.
    """
    broken = []
    for _, checksum, path in _files(folder):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != checksum:
            warnings.warn(
                f"checkpoint {path} is torn or corrupt (checksum differs); using the one before it",
                stacklevel=2,
            )
            broken.append(path)
            continue
        return _decode(content, path, device)
    if broken:
        raise ConfigError(
            f"every checkpoint is corrupt: {', '.join(map(str, broken))}; rerun=true starts again and moves them aside"
        )
    return None


def _decode(content: bytes, path: Path, device) -> dict:
    advice = "rerun=true starts again and moves the run's folder aside"
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"checkpoint {path} was refused: it is not tensors and plain data ({reason}); {advice}"
        ) from None
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ConfigError(f"checkpoint {path} was not written by this suite; {advice}")
    if state["format"] > FORMAT:
        raise ConfigError(
            f"checkpoint {path} has format {state['format']}; this version reads up to {FORMAT}; update koala, "
            f"or {advice}"
        )
    return state
