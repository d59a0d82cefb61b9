"""Stopping on request: the first signal asks, the loop answers at the next step boundary with a checkpoint."""

import signal
import threading

ASK = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # Ctrl-C; a scheduler's time-out or preemption; `sbatch --signal=USR1`


class Stopped(Exception):
    """The run stopped because a signal asked it to; `signum` says which (None: another rank's)."""

    def __init__(self, signum: int | None):
        super().__init__(signal.Signals(signum).name if signum else "another rank was asked to stop")
        self.signum = signum


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
