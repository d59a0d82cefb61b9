"""Runs as Slurm jobs: submits those that are not in the queue yet, and watches queue and records."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from koala import cluster
from koala.reproduce.plan import Run
from koala.reproduce.progress import Event

GRACE = 60.0  # seconds: a job that has left the queue may still be writing its record on another node's disk
PATIENCE = 60  # polls in a row without an answer: Slurm's controller is started again at times


class SlurmLauncher:
    """Jobs of this user's queue.

    Args:
        options: keys of configs/hydra/launcher/slurm.yaml to change, such as {"partition": "gpu"}.
    """

    def __init__(self, options: Mapping[str, object] | None = None):
        self.options = dict(options or {})

    def run(self, runs: list[Run], poll: float = 5.0) -> Iterator[Event | None]:
        """Submits `runs` and yields events until each has a record or has left the queue without one.

        Raises:
            ConfigError: Slurm does not answer, at submission or `PATIENCE` times in a row.
        """
        cluster.submit([run.launched for run in runs], self.options)
        states: dict[Path, str] = {run.path: "waiting" for run in runs}
        left: dict[Path, float] = {}  # when a job without a record was first missing from the queue
        unanswered = 0
        while watched := [run for run in runs if states[run.path] in ("waiting", "running")]:
            try:
                queue, unanswered = cluster.queue([run.cfg for run in watched]), 0
            except cluster.NoAnswer as error:  # the states stay as they are
                unanswered += 1
                if unanswered == PATIENCE:
                    waits = f"tried {PATIENCE} times; jobs stay in the queue, and the same command waits for them"
                    raise cluster.NoAnswer(error.key, error.value, f"{error.reason}; {waits}") from None
                watched = []
            for run in watched:
                event = _event(run, queue, left)
                if event.state != states[run.path]:
                    states[run.path] = event.state
                    yield event
            yield None
            time.sleep(poll)


def _event(run: Run, queue: dict, left: dict[Path, float]) -> Event:
    if run.record() is not None:
        return Event(run, "done")
    if run.path in queue:
        left.pop(run.path, None)
        return Event(run, "waiting" if queue[run.path][1] == "PENDING" else "running")
    if time.monotonic() - left.setdefault(run.path, time.monotonic()) < GRACE:
        return Event(run, "running")
    reason = f"left Slurm's queue without a record; its output is below {run.cfg.output_root}/slurm"
    return Event(run, "failed", reason)
