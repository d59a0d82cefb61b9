"""Checkpoints of a run: written whole or not at all, checked when read, tensors and plain data only.

    step-<step>-<sha256, 16 digits>.pt      the state
    step-<step>-<sha256, 16 digits>/        where ranks hold parts of tensors (FSDP):
        state.pt                            the rest of the state, and the sha256 of every other file
        shard-<rank>-....safetensors        a rank's parts

The name says what the file, or state.pt, must hash to, so one atomic rename publishes content and checksum together.
The last two are kept; a torn or corrupt one is reported and skipped.
"""

import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch

from koala.errors import ConfigError
from koala.records import write_atomically
from koala.training import shards
from koala.training.ranks import ALONE, Ranks

FORMAT = 2  # 1: FSDP's whole state in one file as well
KEEP = 2
STATE = "state.pt"
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})(\.pt)?")
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_ADVICE = "rerun=true starts again and moves the run's folder aside"


def _all(folder: Path) -> list[tuple[int, str, Path]]:
    """(step, checksum, path) of every checkpoint, newest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), match[2], path) for match, path in found), reverse=True)


def exists(folder: Path) -> bool:
    """Whether `folder` holds any checkpoint, sound or not."""
    return bool(_all(folder))


def save(folder: Path, step: int, state: dict, ranks: Ranks = ALONE) -> None:
    """Writes `state` (tensors, numbers, strings, lists, dicts) as the checkpoint of `step` and drops older ones.

    Called by all ranks: the main one writes, and every rank its parts of the sharded tensors in nested dicts.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    parts = {}
    state = {"format": FORMAT, "step": step, **shards.take(state, parts)}
    draft = folder / f".step-{step:09d}.tmp"
    if ranks.is_main:
        for torn in folder.glob(".step-*.tmp"):  # a writer was killed; the run's lock says that no other is at work
            _remove(torn)
    if parts:
        ranks.barrier()
        shards.write(draft, parts)
        own = draft.glob(f"shard-{ranks.rank + 1:05d}-*")
        sums = ranks.gather_objects({path.name: _digest(path) for path in own})
        state["shards"] = {name: digest for part in sums for name, digest in part.items()}
    if ranks.is_main:
        path = _publish(folder, f"step-{step:09d}", state, draft if parts else None)
        for _, _, old in [entry for entry in _all(folder) if entry[2] != path][KEEP - 1 :]:
            # Renamed first: what is left of a folder when its removal is broken off is no checkpoint.
            _remove(old.rename(folder / f".{old.name}.tmp") if old.is_dir() else old)


def _publish(folder: Path, stem: str, state: dict, draft: Path | None) -> Path:
    """Writes `state` as a file, or into the folder `draft`, and gives that its name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    name = f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    if draft is None:
        write_atomically(folder / f"{name}.pt", lambda file: file.write(content))
        return folder / f"{name}.pt"
    write_atomically(draft / STATE, lambda file: file.write(content))
    _flush(draft)
    os.replace(draft, folder / name)
    _flush(folder)
    return folder / name


def _flush(folder: Path) -> None:
    """Has the names in `folder` written to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: Path, ranks: Ranks = ALONE) -> dict | None:
    """The newest sound checkpoint in `folder`, or None when there is none at all. Called by all ranks.

    A sharded one comes without its shards, for `fill` to read.

    Raises:
        ConfigError: one is sound but holds code (which is not loaded), is no checkpoint of ours or of
            a later format; or every checkpoint is corrupt.
    """
    broken = []
    for _, checksum, path in _all(folder):
        file = path / STATE if path.is_dir() else path
        content = file.read_bytes() if file.exists() else b""
        torn = [] if hashlib.sha256(content).hexdigest()[:16] == checksum else [file]
        if not torn:
            state = _decode(content, path)
            torn = _torn_shards(path, state.setdefault("shards", {}), ranks) if path.is_dir() else []
        if not torn:
            return state | {"path": path}
        names = ", ".join(map(str, torn))
        warnings.warn(
            f"checkpoint {names} is torn or corrupt (checksum differs); using the one before it", stacklevel=2
        )
        broken.append(names)
    if broken:
        raise ConfigError(
            f"every checkpoint is corrupt: {', '.join(broken)}; rerun=true starts again and moves them aside"
        )
    return None


def _torn_shards(path: Path, sums: dict[str, str], ranks: Ranks) -> list[Path]:
    """The shard files that are missing or not what they were; ranks share the work and hear of each other's finds.

    Raises:
        ConfigError: there are files that no checkpoint has, or that this one does not name.
    """
    there = set(os.listdir(path)) - {STATE}
    if foreign := sorted({name for name in sums if not _SHARD.fullmatch(name)} | there - set(sums)):
        raise ConfigError(f"checkpoint {path} was refused: {foreign[0]} does not belong in it; {_ADVICE}")
    own = sorted(sums)[ranks.rank :: ranks.world]
    torn = [path / name for name in own if name not in there or _digest(path / name) != sums[name]]
    return [path for part in ranks.gather_objects(torn) for path in part]


def fill(state: dict, here: dict) -> dict:
    """`state`, as `load` gave it, with its shards, which are read into those tensors of `here` that it lacks.

    Args:
        here: nested dicts as they were given to `save`, but of this run: with as many ranks as it has, or whole.

    Raises:
        ConfigError: the shards are not what `save` writes.
    """
    wanted = {}
    state = shards.put_back(state, here, wanted)
    try:
        shards.read(state["path"], wanted)
    except Exception as error:  # of safetensors, of torch's planner: a matching checksum says nothing about the content
        reason = str(error).splitlines()[0]
        raise ConfigError(f"checkpoint {state['path']} was refused: its shards: {reason}; {_ADVICE}") from None
    return state


def _decode(content: bytes, path: Path) -> dict:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"checkpoint {path} was refused: it is not tensors and plain data ({reason}); {_ADVICE}"
        ) from None
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ConfigError(f"checkpoint {path} was not written by this suite; {_ADVICE}")
    if state["format"] > FORMAT:
        raise ConfigError(
            f"checkpoint {path} has format {state['format']}; this version reads up to {FORMAT}; update koala, "
            f"or {_ADVICE}"
        )
    return state
