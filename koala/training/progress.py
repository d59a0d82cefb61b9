"""Where a run is, where its seconds went, and what it came to."""

import os
import statistics
import time
from dataclasses import dataclass

import torch

from koala.training.learner import Learner
from koala.training.ranks import Ranks
from koala.training.tally import Tally

PHASES = ("start", "train", "eval", "save")


@dataclass
class Position:
    """Where a run is: `epoch` epochs done and `index` steps of the next, `step` steps and `rows` evaluations in all."""

    epoch: int = 0
    index: int = 0
    step: int = 0
    rows: int = 0
    measured: int = -1  # step of the last row
    owes_row: bool = False  # an epoch has ended and is yet to be evaluated


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


class Progress:
    """Position, tally and times of a run on this rank. A segment is the part of a run that one process does.

    Args:
        segment: what the record says of this process (koala/records.py), as far as it is known before training.

    Attributes:
        tally: of this rank's samples since the last row.
        logged: the part of it, over all ranks, that log lines have reported; on the CPU.
    """

    def __init__(self, ranks: Ranks, learner: Learner, segment: dict):
        self.ranks, self.learner, self.segment, self.load = ranks, learner, segment, os.getloadavg()[0]
        self.position, self.clock = Position(), Clock(ranks.device)
        self.earlier_segments: list[dict] = []
        self.first_step = 0  # of this segment
        self.begin_tally()

    def begin_tally(self) -> None:
        """Starts counting samples anew, after a row."""
        self.tally = Tally.zero(self.learner.task.counts, self.ranks.device)
        self.logged = Tally.zero(self.tally.names, torch.device("cpu"))

    def segments(self) -> list[dict]:
        """What the record says of each process that did a part of this run, this one last."""
        measured = {
            "from": self.first_step,
            "to": self.position.step,
            "backend": getattr(self.learner.filter, "backend", None),
            "arithmetic": str(self.learner.arithmetic),
            "load": [self.load, os.getloadavg()[0]],
            "seconds": dict(self.clock.seconds),
            "step_ms": self.clock.step_ms,
        }
        return [*self.earlier_segments, self.segment | measured]

    def seconds_left(self, steps: int) -> float:
        """Seconds to the end of a run of `steps` steps, if those to come take as long as those of this segment."""
        spent = sum(self.clock.seconds[phase] for phase in PHASES if phase != "start")
        spent += time.perf_counter() - self.clock.since
        return spent / max(1, self.position.step - self.first_step) * (steps - self.position.step)

    def state_dict(self) -> dict:
        """The state at a step boundary, the same on every rank (a collective)."""
        return {
            "position": vars(self.position).copy(),
            "tally": self.tally.over(self.ranks).sums.cpu(),
            "segments": self.segments(),
        }

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`. This process becomes the next segment."""
        vars(self.position).update(vars(Position(**state["position"])))
        self.earlier_segments, self.first_step = list(state["segments"]), self.position.step
        for phase in PHASES:
            self.clock.before[phase] = sum(float(part["seconds"][phase]) for part in self.earlier_segments)
        saved = Tally.zero(self.tally.names, self.ranks.device)
        saved.sums.copy_(state["tally"])
        if self.ranks.is_main:  # it is that of all ranks together
            self.tally = saved


@dataclass(frozen=True)
class Result:
    """What a run came to. The fields are keys of its record (koala/records.py)."""

    status: str  # finished | diverged
    error: str | None
    metrics: dict[str, dict]  # final: of the last row and of the selected weights; best: over all rows
    steps: int
    epochs: float
    seconds: dict[str, float]  # by phase, over all segments
    segments: list[dict]
    throughput: float | None  # units a second of training
    throughput_unit: str
    peak_memory_bytes: int
    parameters: int  # that are trained
    state_bytes: int  # of the optimizer
