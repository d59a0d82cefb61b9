"""A run's folder: who works in it, its history, and how it is moved aside."""

import datetime
from pathlib import Path

import filelock

from koala import records
from koala.errors import ConfigError
from koala.lock import Lock

LOCK = ".lock"


class RunFolder:
    """The folder of one run, held by at most one process at a time (`lock`: by this one; else by its main rank).

    Raises:
        ConfigError: the folder cannot be written, or another process works on this run.
    """

    def __init__(self, path: Path, lock: bool = True):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(path / LOCK)
            if lock:
                self.lock.acquire(wait=False)
        except filelock.Timeout:
            reason = "another process is working on this run; wait for it"
            raise ConfigError(path, None, reason, valid="another seed or output_root") from None
        except OSError as error:
            reason = f"cannot be written ({error.strerror or error})"
            raise ConfigError("output_root", path, reason, valid="another folder") from None

    def release(self) -> None:
        """Lets others work on the run."""
        self.lock.release()

    def truncate_history(self, rows: int, step: int) -> None:
        """Keeps the first `rows` rows, the last of which is of `step`: a resumed run measures the later ones again.

        Raises:
            ConfigError: the file does not hold them.
        """
        kept = records.read_history(self.path)[:rows]
        metrics = self.path / records.METRICS
        if len(kept) < rows or rows and kept[-1]["step"] != step:
            reason = f"lacks rows that the checkpoint was written after ({rows}, to step {step}); put them back"
            raise ConfigError(metrics, None, f"{reason}, or rerun=true starts again and moves the folder aside")
        if metrics.exists():
            records.write_rows(metrics, kept)


def move_aside(path: Path) -> None:
    """Renames an existing run folder to `<name>.<time>`: nothing computed is ever overwritten."""
    if path.exists():
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        target, count = path.with_name(f"{path.name}.{stamp}"), 1
        while target.exists():
            target, count = path.with_name(f"{path.name}.{stamp}.{count}"), count + 1
        path.rename(target)
