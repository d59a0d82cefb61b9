"""The command line of scripts/reproduce.py."""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import filelock
from rich.console import Console
from rich.text import Text

from koala import terminal
from koala.errors import ConfigError
from koala.lock import Lock
from koala.reproduce.dry_run import show_plan
from koala.reproduce.options import launcher_of, parse, plan_of
from koala.reproduce.plan import Plan
from koala.reproduce.progress import RunProgress, name
from koala.reproduce.search import grow
from koala.tables import write
from koala.tables.cli import RESULTS, load_tables, render
from koala.tables.measured import collect


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        return _main(parse(sys.argv[1:] if arguments is None else arguments))
    except (ConfigError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _main(options: argparse.Namespace) -> int:
    console = terminal.console(soft_wrap=not terminal.is_terminal(sys.stdout))
    plan = plan_of(options)
    lock = _lock(options.output, plan)  # before the search grows: the same command has the same lock
    while grow(plan):
        pass
    if options.dry_run:
        show_plan(plan, console)
        return 0
    progress = RunProgress(plan.runs, console)
    launcher = launcher_of(options, plan)
    rest = "the other command continues with them"
    try:
        _acquire(lock, console)
        jobs = "their jobs stay in Slurm's queue, and the same command waits for them"
        rest = jobs if options.launcher == "slurm" else "the same command resumes them"
        _work(plan, launcher, progress)
    except KeyboardInterrupt:
        console.print(f"stopped with {len(plan.missing)} runs to go; {rest}")
        raise
    finally:
        lock.release()
    try:
        _publish(options, plan, console)
    finally:  # a damaged file of another table changes nothing about these runs
        status = _report(plan, progress)
    return status


def _lock(output: str, plan: Plan) -> Lock:
    """Held by the command that works on these runs."""
    paths = "\n".join(sorted(str(run.path) for run in plan.runs))
    return Lock(Path(output) / "reproduce" / f"{hashlib.sha256(paths.encode()).hexdigest()[:12]}.lock")


def _acquire(lock: Lock, console: Console) -> None:
    """Takes the lock, once no other command holds it.

    Raises:
        ConfigError: the folder of outputs cannot be written.
    """
    try:
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(wait=False)
        except filelock.Timeout:
            console.print("another command works on these runs; this one waits (Ctrl-C leaves that one working)")
            lock.acquire()
    except OSError as error:
        reason = f"not writable ({error.strerror or error})"
        raise ConfigError("--output", lock.path.parents[1], reason, valid="a folder that is") from None


def _work(plan: Plan, launcher, progress: RunProgress) -> None:
    """Runs what is missing, and what follows from it."""
    with progress.bars:
        while True:
            progress.extend(plan.runs)
            missing = [run for run in plan.missing if run.path not in progress.problems]
            done, blocked = len(plan.runs) - len(plan.missing), len(plan.blocked)
            progress.console.print(f"{len(missing)} runs to do, {done} done, {blocked} cells blocked")
            for event in filter(None, launcher.run(missing)):
                progress.apply(event)
            if not grow(plan):
                break


def _publish(options: argparse.Namespace, plan: Plan, console: Console) -> None:
    """Writes the rows, renders the tables, and prints where they are."""
    root = Path(options.output) / "tables" / options.profile
    rows = plan.rows()
    for table in options.names:
        shutil.rmtree(root / "measured" / table, ignore_errors=True)
    collect(root / "measured", rows)
    if options.collect:
        added = collect(RESULTS / "measured", rows)
        console.print(f"{added} rows added to results/measured; scripts/tables.py renders them")
    tables = load_tables(options.names, root / "measured", options.profile)
    render(tables, root)
    few = tables if len(tables) <= 3 else []
    for table in few:
        write.show(table, console)
    paths = [root / "tables" / f"{table.name}.md" for table in few] or [root / "tables"]
    if any(run.cfg.logger.name == "wandb" for run in plan.runs):
        try:
            paths.append(write.log_wandb(tables, root))
        except Exception as error:  # W&B raises many kinds, its own and the network's; the tables are written already
            console.print(Text(f"W&B: {type(error).__name__}: {error}; the tables are in local files only"))
    for path in paths:
        console.print(Text(str(path)))


def _report(plan: Plan, progress: RunProgress) -> int:
    """Prints how the runs ended; returns the exit status."""
    console, runs, failed = progress.console, plan.runs, plan.missing
    diverged = [name(run.path) for run in runs if (record := run.record()) and record["status"] == "diverged"]
    if diverged:
        console.print(f"{len(diverged)} runs diverged: " + ", ".join(diverged))
    for run in failed:
        console.print(Text(f"failed: {name(run.path)}: {progress.problems.get(run.path, 'left no record')}", "red"))
        console.print(Text(f"        {run.command}", "dim"))
    console.print(f"{len(runs) - len(failed)} of {len(runs)} runs done, {len(failed)} failed")
    return 1 if failed else 0
