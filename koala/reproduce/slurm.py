"""Runs as Slurm jobs: submits those that are not in the queue yet, and watches queue and records."""

import time
from collections.abc import Iterator, Mapping

from koala import cluster
from koala.errors import ConfigError
from koala.reproduce.plan import Run
from koala.reproduce.pool import Event

GRACE = 60.0  # seconds: a job that has left the queue may still be writing its record on another node's disk
PATIENCE = 60  # polls in a row without an answer: Slurm's controller is started again at times


class SlurmLauncher:
    """Jobs of this user's queue.

    Args:
        options: keys of configs/hydra/launcher/slurm.yaml to change, such as {"partition": "gpu"}.
    """

    def __init__(self, options: Mapping[str, object] | None = None):
        self.options = dict(options or {})

    def submit(self, runs: list[Run]) -> int:
        """Submits the runs that are not in the queue; returns how many."""
        return len(cluster.submit([run.launched for run in runs], self.options))

    def run(self, runs: list[Run], poll: float = 5.0) -> Iterator[Event | None]:
        """Submits `runs` and yields events until each has a record or has left the queue without one.

        Raises:
            ConfigError: Slurm does not answer, at submission or `PATIENCE` times in a row.
        """
        self.submit(runs)
        states, gone, unanswered = {run.path: "waiting" for run in runs}, {}, 0
        while any(state in ("waiting", "running") for state in states.values()):
            try:
                queue, unanswered = cluster.queue([run.cfg for run in runs]), 0
            except cluster.NoAnswer as error:  # nobody knows, so that what was known stands
                unanswered += 1
                if unanswered == PATIENCE:
                    raise ConfigError(
                        f"{error}; asked {PATIENCE} times; jobs stay in the queue, and the same command waits for them"
                    ) from None
            else:
                for run in runs:
                    if states[run.path] in ("done", "failed"):
                        continue
                    state, problem = self._state(run, queue, gone)
                    if state != states[run.path]:
                        states[run.path] = state
                        yield Event(run, state, problem)
            yield None
            time.sleep(poll)

    @staticmethod
    def _state(run: Run, queue: dict, gone: dict) -> tuple[str, str]:
        if run.record() is not None:
            return "done", ""
        if run.path in queue:
            gone.pop(run.path, None)
            return ("waiting" if queue[run.path][1] == "PENDING" else "running"), ""
        since = gone.setdefault(run.path, time.monotonic())
        if time.monotonic() - since < GRACE:
            return "running", ""
        return "failed", f"left Slurm's queue without a record; its output is below {run.cfg.output_root}/slurm"
