"""Where a run's seconds go, and how long its steps take."""

import statistics
import time

import torch

PHASES = ("start", "train", "eval", "save")


class Clock:
    """Seconds of one segment (what one process does of a run) by phase, and milliseconds a step.

    A segment starts in "start" and leaves it after its first step, which compiles, chooses cuDNN's algorithms and fills
    caches: no throughput contains it. `switch` waits for the device, so that queued work counts where it was queued.

    Args:
        before: seconds of earlier segments, by phase.
    """

    def __init__(self, device: torch.device, before: dict[str, float] | None = None):
        self.device = device
        self.before = dict.fromkeys(PHASES, 0.0) | (before or {})
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self.since = "start", time.perf_counter()
        self.laps: list[float] = []  # seconds a step
        self._mark: tuple[int, float] | None = None

    def switch(self, phase: str) -> str:
        """From now on seconds count for `phase`; returns the phase before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        before, self.phase, self.since = self.phase, phase, now
        return before

    def total(self, phase: str) -> float:
        """Seconds of `phase` in this and all earlier segments."""
        running = time.perf_counter() - self.since if phase == self.phase else 0.0
        return self.before[phase] + self.seconds[phase] + running

    def lap(self, step: int) -> float | None:
        """Notes that step `step` has ended, just after a read from the device; seconds a step since the last call."""
        trained = self.total("train")
        (last, then), self._mark = self._mark or (step, trained), (step, trained)
        if step == last:
            return None
        self.laps.append((trained - then) / (step - last))
        return self.laps[-1]

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds a step of training."""
        return 1e3 * statistics.median(self.laps) if self.laps else None
