"""How far a command is: a live board in a terminal, a line an event elsewhere, and a file for whoever comes back."""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from koala import records
from koala.reproduce.plan import Plan, Run
from koala.reproduce.pool import Event


@dataclass
class Progress:
    """State of every run of a plan: waiting, running, done or failed; why it failed; and how long runs take."""

    plan: Plan
    states: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    parallel: int = 1

    def __post_init__(self):
        self.extend()

    def extend(self) -> None:
        """Takes note of the plan's runs that are new."""
        for run in self.plan.runs:
            if str(run.path) not in self.states:
                self.states[str(run.path)] = "waiting" if run.record() is None else "done"

    def apply(self, event: Event) -> None:
        """Takes note of an event."""
        path = str(event.run.path)
        self.states[path] = event.state
        if event.state == "running":
            self.started[path] = time.monotonic()
        elif path in self.started:
            self.seconds.append(time.monotonic() - self.started[path])
        if event.problem:
            self.problems[path] = event.problem

    def missing(self) -> list[Run]:
        """Runs without a record."""
        return [run for run in self.plan.runs if self.states[str(run.path)] != "done"]

    def cells(self, table: str) -> Counter:
        """Cells of a table by state: one failed run makes a failed cell, one running a running one."""
        found: dict[str, set] = {}
        for place in self.plan.tables().get(table, []):
            found.setdefault(str(place.key), set()).add(self.states[str(place.run.path)])
        order = ("failed", "running", "waiting", "done")
        return Counter(next(state for state in order if state in states) for states in found.values())

    def seconds_left(self) -> float | None:
        """Expected seconds to the end, at the mean time of the runs finished so far; None before the first."""
        counts = Counter(self.states.values())
        if not self.seconds:
            return None
        mean = sum(self.seconds) / len(self.seconds)
        now = time.monotonic()
        under_way = [now - self.started.get(path, now) for path, state in self.states.items() if state == "running"]
        left = counts["waiting"] * mean + sum(max(0.0, mean - spent) for spent in under_way)
        return left / max(1, self.parallel)

    def save(self, path: Path) -> None:
        """Writes the states for another command to show."""
        records.write_json(path, {"pid": os.getpid(), "states": self.states, "problems": self.problems})

    def load(self, path: Path) -> list[Event]:
        """Takes the states that another command wrote, and returns what is new in them; records win."""
        saved = json.loads(path.read_text()) if path.exists() else {"states": {}, "problems": {}}
        events = []
        for run in self.plan.runs:
            known = str(run.path)
            state = "done" if run.record() else saved["states"].get(known, "waiting")
            if state != self.states[known]:
                events.append(Event(run, state, saved["problems"].get(known, "")))
                self.apply(events[-1])
        return events


class Board:
    """Shows a `Progress`: live on a terminal, else one line for each finished run."""

    def __init__(self, progress: Progress, console: Console):
        self.progress, self.console = progress, console
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def refresh(self, event: Event | None = None) -> None:
        """Draws the present state; `event` is what has just happened, if anything."""
        if self.live:
            self.live.update(self.draw(), refresh=True)
        elif event is not None and event.state != "running":
            counts = Counter(self.progress.states.values())
            left = self.progress.seconds_left()
            line = f"[{counts['done'] + counts['failed']}/{sum(counts.values())}] {event.state} {name(event.run.path)}"
            self.console.print(Text(line + (f", {clock(left)} left" if left else "") + f"  {event.problem}".rstrip()))

    def draw(self) -> Group:
        """The board."""
        progress = self.progress
        grid = Table(box=None, pad_edge=False)
        for head in ("table", "cells", "", "done", "running", "waiting", "failed", "blocked"):
            grid.add_column(head, justify="left" if head in ("table", "") else "right", header_style="dim")
        blocked = Counter(spec.name for spec, _ in progress.plan.blocked)
        for table in sorted({*progress.plan.tables(), *blocked}):
            cells = progress.cells(table)
            total = sum(cells.values())
            bar = ProgressBar(total=max(1, total), completed=cells["done"] + cells["failed"], width=24)
            counts = [str(cells[state] or "") for state in ("done", "running", "waiting", "failed")]
            grid.add_row(table, str(total + blocked[table]), bar, *counts, str(blocked[table] or ""))
        counts = Counter(progress.states.values())
        left = progress.seconds_left()
        line = f"{counts['done']} of {sum(counts.values())} runs done, {counts['failed']} failed"
        foot = [Text(line + (f", about {clock(left)} left" if left is not None else ""), "bold")]
        now = time.monotonic()
        for path, state in progress.states.items():
            if state == "running":
                foot.append(Text(f"  {name(Path(path))}  {clock(now - progress.started.get(path, now))}", "dim"))
        return Group(grid, Text(), *foot)


def name(path: Path) -> str:
    """A run folder in words: data/model/optim, hash and seed."""
    return "/".join(path.parts[-5:])


def clock(seconds: float) -> str:
    """Seconds as 12 s, 3 min or 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
