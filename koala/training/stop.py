"""Stopping on request: signals are recorded, and the loop reads between two steps whether one has come."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

# `sbatch --signal=USR1@120`, and submitit's choice, which NCCL leaves alone: the time is nearly up
TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)
# Ctrl-C; a lost terminal; a preemption by the scheduler, or its cancelling
STOP = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, *TIME_IS_UP)


class Stopped(BaseException):
    """The run stopped because signal `signum` told it to; `step` is that of the checkpoint it left, None if none.

    Like KeyboardInterrupt no Exception: Hydra and submitit would take it for the failure of one run and start the next.
    """

    def __init__(self, signum: int, step: int | None = None):
        what = f"stopped by {signal.Signals(signum).name}: "
        if step is None:
            super().__init__(what + "no checkpoint was written for it; the same command resumes from the last, if any")
        else:
            super().__init__(what + f"the checkpoint of step {step} was written; the same command resumes from it")
        self.signum, self.step = signum, step


def requeue(stop: Stopped) -> None:
    """In a Slurm job whose time is nearly up, asks (from one rank) that the same job be queued again.

    Not after SIGTERM: a preempted job is queued again by Slurm itself, and a cancelled one is to stay away.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))  # torchrun's ranks share one SLURM_PROCID
    if stop.signum not in TIME_IS_UP or "SLURM_JOB_ID" not in os.environ or rank != "0":
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the id of one of an array's tasks is that of the array as well
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        print(f"job {job} is not queued again ({reason}); submit it once more to resume", file=sys.stderr)


class StopSignal:
    """The signal that told this process, or the process that started it, to stop.

    Signals are a process's, so there is one instance in each: `stop_signal`. A process shares part of it with the
    workers that it starts, which leave the terminal's signals to it: what reaches it, reaches them. Before a loop has
    started nobody would answer, and nothing is lost: until then a signal ends the process at once, with its workers.
    """

    def __init__(self) -> None:
        self.received = 0  # by this process alone
        # Signal for this process and all its workers; whether a loop has started
        self.shared = multiprocessing.get_context("spawn").RawArray("i", 2)

    @property
    def number(self) -> int:
        """The number of the first signal to stop, 0 when there was none."""
        return self.received or self.shared[0]

    def loop_started(self) -> None:
        """From now on a loop reads `number` between two steps."""
        self.shared[1] = 1

    @contextlib.contextmanager
    def listening(self, person: bool) -> Iterator[None]:
        """Signals are recorded; a second Ctrl-C ends the process at once, if a `person` and no agent sends it."""
        self.received, self.shared[:] = 0, (0, 0)
        here = os.getpid()  # a data loader's forked workers inherit the handler, and the terminal's signals reach them

        def note(signum, frame):
            if os.getpid() != here:
                return
            if not self.shared[1] or (person and signum == self.number == signal.SIGINT):
                for worker in multiprocessing.active_children():
                    worker.kill()
                raise Stopped(signum)
            self.shared[0] = self.shared[0] or signum

        with _handled(note):
            yield

    @contextlib.contextmanager
    def obeying(self, shared) -> Iterator[None]:
        """In a worker: the terminal's signals are left to its parent, through `shared`; others are recorded."""
        self.received, self.shared = 0, shared

        def note(signum, frame):
            if signum not in (signal.SIGINT, signal.SIGHUP):
                self.received = self.received or signum

        with _handled(note):
            yield


@contextlib.contextmanager
def _handled(handler) -> Iterator[None]:
    """`handler` for the signals of `STOP`, but for those that whoever started the process has it ignore (nohup)."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        heeded = [number for number in STOP if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


stop_signal = StopSignal()
