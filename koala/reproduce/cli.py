"""The command line of scripts/reproduce.py."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
from rich.console import Console
from rich.text import Text

from koala.errors import ConfigError
from koala.reproduce.board import Board, Progress, clock, name
from koala.reproduce.dry_run import show_plan
from koala.reproduce.options import launcher_of, parser, plan_of
from koala.reproduce.plan import Plan
from koala.reproduce.search import grow
from koala.tables.load import find_specs
from koala.tables.measured import collect, measured_path
from koala.tables.publish import EXPERIMENTS, ROOT, Places, load_tables, publish
from koala.tables.terminal import show


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_intermixed_args(arguments)
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        plan = plan_of(options)
        progress = Progress(plan)
        path = _state_path(options, progress)  # before the search grows: the same command finds the same file
        while grow(plan):
            pass
        progress.extend()
        if options.dry_run:
            show_plan(plan, ROOT / "results" / "measured", console)
            return 0
        launcher = launcher_of(options, plan)
        _make_folder(options, path.parent)
    except ConfigError as error:
        return _refused(error)
    if options.detach:
        return _detach(options, arguments, progress, path, launcher, console)
    try:
        _work(progress, path, launcher, console)
    except ConfigError as error:
        return _refused(error)
    except KeyboardInterrupt:
        left = f"{len(Progress(plan).missing())} runs to go"
        if _held(_lock(path)):
            console.print(f"{left}; the other command goes on with them")
        elif options.launcher == "slurm":
            console.print(f"{left}; their jobs stay in Slurm's queue, and the same command waits for them")
        else:
            console.print(f"stopped with {left}; the same command goes on from there")
        return 130
    try:
        _publish(options, plan, console)
    except (ConfigError, OSError) as error:  # such as a torn file of another table: the runs have come to their end
        _report(progress, console)
        return _refused(error)
    return _report(progress, console)


def _refused(error: Exception) -> int:
    """Says in one line what is wrong; returns the exit status for it."""
    print(f"reproduce.py: {error}", file=sys.stderr)
    return 2


def _state_path(options: argparse.Namespace, progress: Progress) -> Path:
    """One file for one set of runs: the same command finds it again."""
    import hashlib

    text = "\n".join(sorted(progress.states))
    return Path(options.output) / "reproduce" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _make_folder(options: argparse.Namespace, folder: Path) -> None:
    """Makes the folder of state files, below that of the output; that it can't be written is known before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output {options.output}: not writable ({error.strerror or error}); valid: a folder that is"
        ) from None


def _work(progress: Progress, path: Path, launcher, console: Console) -> None:
    """Runs what is missing, and what that asks for; or watches the command that is already at it."""
    lock = _lock(path)
    with Board(progress, console) as board:
        try:
            with lock.acquire(timeout=0):
                while True:
                    missing = progress.missing()
                    progress.parallel = min(getattr(launcher, "jobs", len(missing)), len(missing))
                    done = len(progress.states) - len(missing)
                    console.print(f"{len(missing)} runs to do, {done} done, {len(progress.plan.blocked)} cells blocked")
                    progress.save(path)
                    for event in launcher.run(missing):
                        if event is not None:
                            progress.apply(event)
                            progress.save(path)
                        board.refresh(event)
                    if not grow(progress.plan):
                        break
                    progress.extend()
        except filelock.Timeout:
            console.print("another command is at work on these runs; this is its board (Ctrl-C leaves it working)")
            while _held(lock):
                for event in progress.load(path) or [None]:
                    board.refresh(event)
                time.sleep(1)
            progress.load(path)
            while grow(progress.plan):
                progress.extend()


def _lock(path: Path) -> filelock.FileLock:
    """Held by the command that works on the runs whose states are in `path`."""
    return filelock.FileLock(path.with_suffix(".lock"))


def _held(lock: filelock.FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def _detach(options, arguments: list[str], progress: Progress, path: Path, launcher, console: Console) -> int:
    again = "the same command without --detach shows the board"
    if options.launcher == "slurm":
        try:
            submitted = launcher.submit(progress.missing())
        except ConfigError as error:
            return _refused(error)
        console.print(f"{submitted} jobs submitted; {again}")
        return 0
    log = path.with_suffix(".log")
    with open(log, "a", encoding="utf-8") as file:
        rest = [text for text in arguments if text != "--detach"]
        command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *rest]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    console.print(f"at work as process {process.pid}, log {log}; {again}")
    return 0


def _publish(options, plan: Plan, console: Console) -> None:
    """Writes the rows and renders the tables; says where everything is."""
    root = Path(options.output) / "tables" / options.profile
    places = Places.below(root)
    rows = plan.rows()
    for table in options.names:
        path = measured_path(places.measured, table)
        path.unlink(missing_ok=True)
    collect(places.measured, rows)
    if options.collect:
        added = collect(ROOT / "results" / "measured", rows)
        console.print(f"{added} rows appended to results/measured; scripts/tables.py renders them")
    kept = [known for known in find_specs(EXPERIMENTS) if measured_path(places.measured, known).exists()]
    tables = load_tables(dict.fromkeys([*options.names, *kept]), places.measured, options.profile)
    written = publish(tables, places)  # the page has every table that was rendered, not those of this command alone
    asked = [table for table in tables if table.spec.name in options.names]
    for table in asked if len(asked) <= 3 else []:
        show(table, console)
    shown = [places.tables / f"{table.spec.name}.md" for table in asked if len(asked) <= 3]
    shown.append(written[-1])
    if any(run.cfg.logger.name == "wandb" for run in plan.runs):
        from koala.tables.wandb_log import log_tables

        try:
            shown.append(log_tables(tables, root))
        except Exception as error:  # W&B raises many kinds, its own and the network's; the tables are written already
            console.print(Text(f"W&B: {type(error).__name__}: {error}; the tables are in local files only"))
    for path in shown:
        console.print(Text(str(path)))


def _report(progress: Progress, console: Console) -> int:
    without = [run for run in progress.plan.runs if run.record() is None]
    left = [run for run in without if progress.states[str(run.path)] != "failed"]  # of a command that was watched
    failed = [run for run in without if run not in left]
    diverged = [run for run in progress.plan.runs if (record := run.record()) and record["status"] == "diverged"]
    if diverged:
        console.print(f"{len(diverged)} runs diverged: " + ", ".join(name(run.path) for run in diverged))
    for run in failed:
        console.print(Text(f"failed: {name(run.path)}: {progress.problems[str(run.path)]}", "red"))
        console.print(Text(f"        {run.command}", "dim"))
    spent = f", {clock(sum(progress.seconds))} of runs" if progress.seconds else ""
    done = len(progress.states) - len(without)
    console.print(f"{done} of {len(progress.states)} runs done, {len(failed)} failed{spent}")
    if left:
        console.print(f"{len(left)} runs to go: nobody is at work on them any more; the same command goes on")
    return 1 if without else 0
