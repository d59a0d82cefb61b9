"""A run's folder: its lock, its history, its record."""

import datetime
import shlex
import sys
import time
from pathlib import Path

import filelock
import torch
from omegaconf import DictConfig, OmegaConf

from koala import fingerprint, records
from koala.errors import ConfigError
from koala.training.config import config_hash, run_name
from koala.training.machine import device_name

LOCK = ".lock"


def now() -> str:
    """UTC, ISO 8601, seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunFolder:
    """The folder of one run, held by at most one process at a time (`lock`: by this one; else by its main rank).

    The lock belongs to the open file, so it goes with the process however that ends.

    Raises:
        ConfigError: the folder cannot be written, or another process works on this run.
    """

    def __init__(self, path: Path, lock: bool = True):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / records.METRICS
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(path / LOCK)
            if lock:
                self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"another process is working on this run ({path}); wait for it or choose another seed or output_root"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"output_root: {path} cannot be written ({error.strerror or error}); choose another with "
                "output_root=DIR"
            ) from None

    def release(self) -> None:
        """Lets others work on the run."""
        self.lock.release()

    def truncate_history(self, rows: int, step: int) -> None:
        """Keeps the first `rows` rows, the last of which is of `step`: a resumed run measures the later ones again.

        Raises:
            ConfigError: the file does not hold them.
        """
        kept = records.read_history(self.path)[:rows]
        if len(kept) < rows or rows and kept[-1]["step"] != step:
            raise ConfigError(
                f"{self.metrics} lacks rows that the checkpoint was written after ({rows}, to step {step}); put them "
                "back, or rerun=true starts again and moves the run's folder aside"
            )
        if self.metrics.exists():
            records.write_rows(self.metrics, kept)


def move_aside(path: Path) -> None:
    """Renames an existing run folder to `<name>.<time>`: nothing computed is ever overwritten."""
    if path.exists():
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        target, count = path.with_name(f"{path.name}.{stamp}"), 1
        while target.exists():
            target, count = path.with_name(f"{path.name}.{stamp}.{count}"), count + 1
        path.rename(target)


def opening(cfg: DictConfig, ranks, command: str | None) -> dict:
    """What is known of a run when it starts; the end adds status, metrics and times."""
    return {
        "schema": 1,
        "name": run_name(cfg),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "config_hash": config_hash(cfg),
        "seed": cfg.seed,
        "precision": cfg.precision,
        "world_size": ranks.world,
        "device": device_name(ranks.device),
        "versions": fingerprint.versions(),
        "git": fingerprint.git(),
        "command": command or shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": now(),
        "history": records.METRICS,
    }


class Stopwatch:
    """Seconds of work, from the monotonic clock (so that the wall clock may jump), continued over resumptions."""

    def __init__(self, seconds: float = 0.0):
        self.total, self.since = seconds, None

    def start(self) -> None:
        """Starts or goes on."""
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Pauses."""
        self.total, self.since = self.seconds, None

    @property
    def seconds(self) -> float:
        """So far."""
        return self.total + (time.perf_counter() - self.since if self.since is not None else 0.0)


def segment(cfg: DictConfig, ranks) -> dict:
    """What is known at its start of the part of a run that these ranks do, for its record."""
    return {
        "sources": fingerprint.sources(),
        "versions": fingerprint.versions(),
        "git": fingerprint.git(),
        "device": device_name(ranks.device),
        "threads": torch.get_num_threads(),
        "compile": cfg.compile,
        "ranks": ranks.world,
    }
