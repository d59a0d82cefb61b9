"""Worker processes that run one training run after another, and survive each other's death.

A worker is a fresh interpreter (spawn) that imports torch once and then launches runs in its own main thread. It ends
with its parent, however that ends, so that a killed command leaves nobody working; and when a worker is killed itself,
its run is tried once more by a new one, from the run's checkpoint.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from koala.records import METRICS, write_json
from koala.reproduce.plan import TIMING, Run

ATTEMPTS = 2


@dataclass(frozen=True)
class Event:
    """Something happened to a run: it is `running`, `done` or `failed` (with why)."""

    run: Run
    state: str
    problem: str = ""


@dataclass
class Worker:
    """A process, the pipe to it, the pipe whose end it watches, and what it is doing."""

    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    lifeline: connection.Connection
    run: Run | None = None


class LocalPool:
    """Runs on this machine, `jobs` at a time.

    Args:
        jobs: worker processes.
        threads: CPU threads of each.
        gpus: for each worker, the GPU ids it sees; empty when there are none.
    """

    def __init__(self, jobs: int, threads: int, gpus: list[str] | None = None):
        self.context = multiprocessing.get_context("spawn")
        self.jobs, self.threads, self.gpus = jobs, threads, gpus or []
        self.workers: dict[int, Worker] = {}
        self.timing = {"command": uuid.uuid4().hex[:12], "jobs": jobs}

    def run(self, runs: list[Run], poll: float = 0.5) -> Iterator[Event | None]:
        """Runs all of `runs`, yielding events as they happen and None at least every `poll` seconds."""
        waiting, attempts = deque(runs), dict.fromkeys((run.path for run in runs), 0)
        try:
            while waiting or any(worker.run for worker in self.workers.values()):
                for slot in range(min(self.jobs, len(runs))):
                    if waiting and (slot not in self.workers or self.workers[slot].run is None):
                        run = waiting.popleft()
                        attempts[run.path] += 1
                        self._give(slot, run)
                        yield Event(run, "running")
                yield from self._collect(waiting, attempts, poll)
                yield None
        finally:
            self.close()

    def _give(self, slot: int, run: Run) -> None:
        if slot in self.workers and not self.workers[slot].process.is_alive():  # killed while it waited for work
            self._discard(slot)
        worker = self.workers.get(slot) or self._start(slot)
        worker.run = run
        worker.pipe.send((list(run.launched), str(run.path), run.command, self.timing))

    def _start(self, slot: int) -> Worker:
        ours, theirs = self.context.Pipe()
        watched, lifeline = self.context.Pipe(duplex=False)
        visible = self.gpus[slot] if self.gpus else None
        process = self.context.Process(target=work, args=(theirs, watched, self.threads, visible))
        process.start()
        theirs.close()
        watched.close()
        self.workers[slot] = Worker(process, ours, lifeline)
        return self.workers[slot]

    def _collect(self, waiting: deque, attempts: dict[Path, int], poll: float) -> Iterator[Event]:
        slots = {worker.pipe: slot for slot, worker in self.workers.items() if worker.run}
        for pipe in connection.wait(list(slots), poll):
            slot = slots[pipe]
            worker = self.workers[slot]
            run, worker.run = worker.run, None
            try:
                status, problem = worker.pipe.recv()
            except (EOFError, ConnectionError):
                worker.process.join()
                self._discard(slot)
                if attempts[run.path] < ATTEMPTS:
                    waiting.appendleft(run)
                    continue
                status, problem = "failed", f"its process died {ATTEMPTS} times (exit code {worker.process.exitcode})"
            yield Event(run, "failed" if status == "failed" else "done", problem)

    def _discard(self, slot: int) -> None:
        worker = self.workers.pop(slot)
        worker.pipe.close()
        worker.lifeline.close()

    def close(self) -> None:
        """Ends the workers: idle ones leave, busy ones are asked to write a checkpoint and are gone after 20 s."""
        for worker in self.workers.values():
            worker.pipe.close()
            if worker.run:
                worker.process.terminate()
        deadline = time.monotonic() + 20
        for slot in list(self.workers):
            worker = self.workers[slot]
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.lifeline.close()
            worker.process.join(1)
            del self.workers[slot]


def work(pipe: connection.Connection, lifeline: connection.Connection, threads: int, gpus: str | None) -> None:
    """A worker's life: receive a run, launch it, report its status; all it prints goes to the run's own log."""
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            overrides, path, command, timing = pipe.recv()
        except EOFError:
            return
        try:
            status, problem = launch_run(overrides, Path(path), command, timing)
            pipe.send((status, problem))
        except BrokenPipeError:
            return


def launch_run(overrides: list[str], path: Path, command: str, timing: dict) -> tuple[str, str]:
    """Launches one run with its output in a log beside its folder; returns its status and, for a failed one, why.

    A run that was not begun before is noted as timed by this command.
    """
    from koala.runs import compose, launch
    from koala.training import checkpoint

    begun = (path / METRICS).exists() or checkpoint.exists(path / checkpoint.FOLDER)
    fresh = "rerun=true" in overrides or not begun
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_of(path), "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        status = launch(compose(overrides), command)["status"]
        if fresh:
            write_json(path / TIMING, timing)
        return status, ""
    except BaseException as error:  # whatever ends a run must end neither the worker nor the other runs
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error} (see {log_of(path)})"


def log_of(path: Path) -> Path:
    """Where the output of the run in folder `path` goes: beside it, for a run made again has its folder moved aside."""
    return path.with_name(f"{path.name}.log")


def _end_with_parent(lifeline: connection.Connection) -> None:
    """Waits for the other end to close, which the system does when the parent ends, killed or not."""
    try:
        lifeline.recv()
    except EOFError:
        os._exit(1)
