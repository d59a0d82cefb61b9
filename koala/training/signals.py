"""Stopping on request: the first signal asks, the loop answers at the next step boundary with a checkpoint."""

import os
import signal
import subprocess
import threading

# `sbatch --signal=USR1@120`, and submitit's choice, which NCCL leaves alone: the time is nearly up
TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)
# Ctrl-C; a preemption by the scheduler, or its cancelling
ASK = (signal.SIGINT, signal.SIGTERM, *TIME_IS_UP)


class Stopped(BaseException):
    """The run stopped because a signal asked it to; `signum` says which.

    Like KeyboardInterrupt no Exception: Hydra and submitit would take it for the failure of one run and go on.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def requeue(stop: Stopped) -> None:
    """In a Slurm job whose time is nearly up, asks (from one rank) that the same job be queued again.

    Not after SIGTERM: a preempted job is queued again by Slurm itself, and a cancelled one is to stay away.
    """
    if stop.signum in TIME_IS_UP and "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_PROCID", "0") == "0":
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)


class StopSignals:
    """While open, the signals of `ASK` are noted in `received`; a second Ctrl-C interrupts at once."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in ASK}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
