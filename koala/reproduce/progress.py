"""How far a command is: bars on a terminal, else a line for each run that ends."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from koala.reproduce.plan import Run


@dataclass(frozen=True)
class Event:
    """A run is `running`, `done`, `failed` (with why), or `waiting` in a queue again."""

    run: Run
    state: str
    problem: str = ""


class RunProgress:
    """Counts runs as they end. `problems`: why runs failed, by their folder."""

    def __init__(self, runs: Iterable[Run], console: Console):
        self.console, self.problems = console, {}
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}")
        self.bars = Progress(*columns, note, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self.bar = self.bars.add_task("runs", note="")
        self.running: dict[Path, TaskID] = {}
        self.ended: set[Path] = set()
        self.here, self.began = 0, time.monotonic()  # runs that ended since then
        self.extend(runs)

    def extend(self, runs: Iterable[Run]) -> None:
        """Counts new runs, too; those that have a record ended before."""
        self.runs = list(runs)
        self.ended |= {run.path for run in self.runs if run.record() is not None}
        self.bars.update(self.bar, total=len(self.runs), completed=len(self.ended))

    def apply(self, event: Event) -> None:
        """Shows an event."""
        path = event.run.path
        if path in self.running:
            self.bars.remove_task(self.running.pop(path))
        if event.state == "running":
            self.running[path] = self.bars.add_task(f"  {name(path)}", total=None, note="")
        if event.state not in ("done", "failed"):
            return
        self.ended.add(path)
        self.here += 1
        if event.problem:
            self.problems[path] = event.problem
        failed, left = f"{len(self.problems)} failed" if self.problems else "", self._left()
        self.bars.update(self.bar, completed=len(self.ended), note=", ".join(filter(None, (failed, left))))
        if self.bars.disable:
            line = f"[{len(self.ended)}/{len(self.runs)}] {event.state} {name(path)}"
            self.console.print(Text(", ".join(filter(None, (line, left))) + f"  {event.problem}".rstrip()))

    def _left(self) -> str:
        """The expected time to the end, at the pace so far."""
        remaining = len(self.runs) - len(self.ended)
        return f"{clock((time.monotonic() - self.began) / self.here * remaining)} left" if remaining else ""


def name(path: Path) -> str:
    """A run folder for a reader: data/model/optim, hash and seed."""
    return "/".join(path.parts[-5:])


def clock(seconds: float) -> str:
    """Seconds as 12 s, 3 min or 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
