"""Checkpoints of a run: written completely or not at all, checked when read, tensors and plain data only.

    step-<step>-<serial>-<sha256, 16 digits>.pt      the state
    step-<step>-<serial>-<sha256, 16 digits>/        where ranks hold parts of tensors (FSDP):
        state.pt                                     the rest of the state, and the sha256 of every other file
        shard-<rank>-....safetensors                 a rank's parts

The checksum in the name is that of the file, or of state.pt, so one atomic rename publishes content and checksum
together. The serial number tells which was written last: a step can be saved twice, before and after its evaluation.
The last two are kept; a torn or corrupt one is reported and skipped.
"""

import hashlib
import io
import os
import re
import shutil
import threading
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from koala.errors import ConfigError, first_line
from koala.records import write_atomically
from koala.training import shards
from koala.training.ranks import ALONE, Ranks

FORMAT = 3
FOLDER = "checkpoints"  # below the run's
KEEP = 2
STATE = "state.pt"
AGAIN = "rerun=true, which starts again and moves the run's folder aside"
_NAME = re.compile(r"step-(\d+)-(\d+)-([0-9a-f]{16})(\.pt)?")
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def _all(folder: Path) -> list[tuple[int, str, Path]]:
    """(serial, checksum, path) of every checkpoint, the last one written first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[2]), match[3], path) for match, path in matches if match), reverse=True)


def exists(folder: Path) -> bool:
    """Whether `folder` holds any checkpoint, sound or not."""
    return bool(_all(folder))


class Writer:
    """Writes a run's checkpoints, one at a time. Called by all ranks.

    Args:
        background: serialise, hash and write while training continues, from a copy of the state on the host; else
            training waits. Of a sharded state every rank copies and writes its part; the main rank renames the folder.
        timeout: seconds that ranks wait for each other when they write a sharded state in the background.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE, background: bool = False, timeout: float = 1800.0):
        self.folder, self.ranks, self.background, self.timeout = folder, ranks, background, timeout
        self.saved: int | None = None  # step of the last checkpoint that is there
        self._thread: threading.Thread | None = None
        self._group: dist.ProcessGroup | None = None  # of the writing threads: training's group is busy
        self._failure: Exception | None = None
        if ranks.is_main:
            for torn in folder.glob(
                ".*.tmp"
            ):  # a writer was killed; none is at work now, for this process has the run's lock
                _remove(torn)

    def save(self, step: int, state: dict) -> None:
        """Writes `state` (tensors, numbers, strings, lists, dicts) as the checkpoint of `step` and drops older ones.

        Raises:
            OSError: the disk is full or the folder cannot be written, now or when the one before was written; earlier
                checkpoints are untouched.
        """
        self.wait()
        parts = {}
        state = {"format": FORMAT, "step": step, **shards.take(state, parts)}
        if parts:
            parts = _snapshot(parts)  # also while training waits: safetensors refuse tied weights, which are one tensor
            if self.background and self._group is None:
                self._group = self.ranks.aside(self.timeout)
        elif not self.ranks.is_main:
            self.saved = step
            return
        if self.background:
            state = _snapshot(state) if self.ranks.is_main else state
            self._thread = threading.Thread(
                target=self._write_in_background, args=(step, state, parts), name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(step, state, parts)
        self.saved = step

    def wait(self) -> None:
        """Waits for the write that is under way.

        Raises:
            OSError: it could not be written.
        """
        self.join()
        self.check()

    def join(self) -> None:
        """As `wait`, but without raising: for a run that ends for another reason."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises the error of a write in the background, if there was one."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write_in_background(self, step: int, state: dict, parts: dict) -> None:
        try:
            self._write(step, state, parts)
        except Exception as error:  # raised in the thread that trains, by `check`
            self._failure = error

    def _write(self, step: int, state: dict, parts: dict) -> None:
        if parts:
            self._write_sharded(step, state, parts)
        else:
            self._commit(step, state)

    def _write_sharded(self, step: int, state: dict, parts: dict) -> None:
        draft = self.folder / f".step-{step:09d}.tmp"
        shards.write(draft, parts, self._group)
        written = draft.glob(f"shard-{self.ranks.rank + 1:05d}-*")
        digests = self.ranks.gather_objects({path.name: _digest(path) for path in written}, self._group)
        state["shards"] = {name: digest for of_rank in digests for name, digest in of_rank.items()}
        failure = None
        if self.ranks.is_main:
            try:
                self._commit(step, state, draft)
            except OSError as error:
                failure = error
        if failure := self.ranks.gather_objects(failure, self._group)[0]:  # then no rank takes it for written
            raise failure

    def _commit(self, step: int, state: dict, draft: Path | None = None) -> None:
        """Renames the new checkpoint into place, and removes those that are too old."""
        existing = _all(self.folder)
        serial = existing[0][0] + 1 if existing else 1
        path = _publish(self.folder, f"step-{step:09d}-{serial:06d}", state, draft)
        for _, _, old in [entry for entry in _all(self.folder) if entry[2] != path][KEEP - 1 :]:
            # Renamed first: what is left of a folder when its removal is broken off is no checkpoint.
            _remove(old.rename(self.folder / f".{old.name}.tmp") if old.is_dir() else old)


def _snapshot(value):
    """A copy of nested dicts, lists and tensors on the host, which later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    return type(value)(map(_snapshot, value)) if isinstance(value, (list, tuple)) else value


def _publish(folder: Path, stem: str, state: dict, draft: Path | None) -> Path:
    """Writes `state` as a file, or into the folder `draft`, and gives that its name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    name = f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    if draft is None:
        write_atomically(folder / f"{name}.pt", content)
        return folder / f"{name}.pt"
    write_atomically(draft / STATE, content)
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
            torn = _torn_shards(path, state["shards"], ranks) if path.is_dir() else []
        if not torn:
            return state | {"path": path}
        names = ", ".join(map(str, torn))
        warnings.warn(
            f"checkpoint {names} is torn or corrupt (checksum differs); using the one before it", stacklevel=2
        )
        broken.append(names)
    if broken:
        raise ConfigError(", ".join(broken), None, "every checkpoint is corrupt", valid=AGAIN)
    return None


def _torn_shards(path: Path, sums: dict[str, str], ranks: Ranks) -> list[Path]:
    """The shard files that are missing or have changed. Each rank reads a part of them; all return all.

    Raises:
        ConfigError: there are files that no checkpoint has, or that this one does not name.
    """
    files = set(os.listdir(path)) - {STATE}
    if foreign := sorted({name for name in sums if not _SHARD.fullmatch(name)} | files - set(sums)):
        raise refusal(path, f"{foreign[0]} does not belong in it")
    to_check = sorted(sums)[ranks.rank :: ranks.world]
    torn = [path / name for name in to_check if name not in files or _digest(path / name) != sums[name]]
    return [path for part in ranks.gather_objects(torn) for path in part]


def fill(state: dict, like: dict) -> dict:
    """`state`, as `load` gave it, with its shards, which are read into those tensors of `like` that it lacks.

    Args:
        like: nested dicts as they were given to `save`, but of this run: with as many ranks as it has, or unsharded.

    Raises:
        ConfigError: the shards are not what `save` writes.
    """
    missing = {}
    state = shards.put_back(state, like, missing)
    try:
        shards.read(state["path"], missing)
    except Exception as error:  # of safetensors, of torch's planner: a matching checksum says nothing about the content
        raise refusal(state["path"], error) from None
    return state


def _decode(content: bytes, path: Path) -> dict:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: a matching checksum says nothing about the content
        raise refusal(path, f"it is not tensors and plain data ({_line(error)})") from None
    if not isinstance(state, dict) or not {"format", "step", "model"} <= state.keys():
        raise refusal(path, "it was not written by this suite")
    if state["format"] != FORMAT:
        raise refusal(path, f"it has format {state['format']!r}; this version of koala reads {FORMAT}")
    sums = state.setdefault("shards", {})
    if not isinstance(sums, dict) or not all(isinstance(name, str) for name in sums):
        raise refusal(path, "it was not written by this suite")
    return state


def refusal(path: Path, reason: str | Exception) -> ConfigError:
    """The error for a checkpoint that is sound but cannot be resumed from."""
    reason = f"its content does not fit this run ({_line(reason)})" if isinstance(reason, Exception) else reason
    return ConfigError(path, None, f"the checkpoint is refused: {reason}", valid=AGAIN)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
