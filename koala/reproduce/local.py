"""Runs on this machine: worker processes that take one run after another, and are replaced when they die.

A worker is a fresh interpreter (spawn) that imports torch once and launches runs in its main thread, where signals
arrive. Each has an executor of its own: an executor loses all its workers when one dies. A worker ends with this
process, even if that is killed, so that nothing keeps the lock of a run. The run of a worker that died is started once
more, from its checkpoint.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import torch

from koala.lock import Lock
from koala.records import METRICS, write_json
from koala.reproduce.plan import TIMING, Run
from koala.reproduce.progress import Event
from koala.runs import compose, launch
from koala.runs.folder import LOCK
from koala.training import checkpoint

ATTEMPTS = 2
TO_STOP = 20.0  # seconds that a worker has for its last checkpoint


class LocalLauncher:
    """Runs on this machine, `jobs` at a time.

    Args:
        jobs: worker processes.
        threads: CPU threads of each.
        gpus: for each worker, the ids of the GPUs it sees; none: there are none.
    """

    def __init__(self, jobs: int, threads: int, gpus: list[str] | None = None):
        self.jobs, self.threads, self.gpus = jobs, threads, gpus or [None] * jobs
        self.executors: dict[int, ProcessPoolExecutor] = {}
        self.timing = {"command": uuid.uuid4().hex[:12], "jobs": jobs}

    def run(self, runs: list[Run], poll: float = 0.5) -> Iterator[Event | None]:
        """Runs all of `runs`, yielding events as they happen and None at least every `poll` seconds."""
        waiting, attempts, free = deque(runs), Counter(), list(range(self.jobs))
        at_work: dict[Future, tuple[int, Run]] = {}
        others = multiprocessing.active_children()
        try:
            while waiting or at_work:
                while waiting and free:
                    slot, run = free.pop(0), waiting.popleft()
                    attempts[run.path] += 1
                    at_work[self._start(slot, run)] = slot, run
                    yield Event(run, "running")
                for future in wait(at_work, poll, FIRST_COMPLETED).done:
                    slot, run = at_work.pop(future)
                    free.append(slot)
                    try:
                        problem = future.result()
                    except BrokenProcessPool:
                        del self.executors[slot]
                        if attempts[run.path] < ATTEMPTS:
                            waiting.appendleft(run)
                            continue
                        problem = f"its process was killed {ATTEMPTS} times (see {log_of(run.path)})"
                    yield Event(run, "failed" if problem else "done", problem)
                yield None
        finally:
            self._close(bool(at_work), [child for child in multiprocessing.active_children() if child not in others])

    def _start(self, slot: int, run: Run) -> Future:
        if slot not in self.executors:
            self.executors[slot] = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), prepare, (self.threads, self.gpus[slot])
            )
        try:
            return self.executors[slot].submit(launch_run, run, self.timing)
        except BrokenProcessPool:  # its worker was killed between two runs
            del self.executors[slot]
            return self._start(slot, run)

    def _close(self, interrupted: bool, workers: list) -> None:
        """Ends the workers; those that are interrupted write a checkpoint first, if it takes no longer than TO_STOP."""
        for executor in self.executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        self.executors.clear()
        if interrupted:
            for worker in workers:
                worker.terminate()
        deadline = time.monotonic() + TO_STOP
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.kill()


def prepare(threads: int, gpus: str | None) -> None:
    """Prepares a worker before its first run."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def launch_run(run: Run, timing: dict) -> str:
    """Launches one run with its output in a log beside its folder; returns why it failed, or nothing.

    `timing` is kept for a run that was not begun before, since one command then times all of it.
    """
    path = run.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_of(path), "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        _wait_for_others(path)
        begun = (path / METRICS).exists() or checkpoint.exists(path / checkpoint.FOLDER)
        overrides = run.launched
        launch(compose(overrides), run.command)
        if "rerun=true" in overrides or not begun:
            write_json(path / TIMING, timing)
        return ""
    except BaseException as error:  # whatever ends a run must end neither the worker nor the other runs
        traceback.print_exc()
        return f"{type(error).__name__}: {error} (see {log_of(path)})"


def _wait_for_others(path: Path) -> None:
    """Waits until no other process works on the run in folder `path`; its record, if it leaves one, is the run's."""
    if (path / LOCK).exists():
        lock = Lock(path / LOCK)
        try:
            lock.acquire(wait=False)
        except filelock.Timeout:
            print("another process works on this run; this one waits for it", flush=True)
            lock.acquire()
        lock.release()


def log_of(path: Path) -> Path:
    """The file with the output of the run in folder `path`: beside it, as a run made again has its folder moved."""
    return path.with_name(f"{path.name}.log")
