"""The command line of scripts/reproduce.py."""

import argparse
import os
import re
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
from koala.reproduce.plan import Plan, make_plan, typed
from koala.reproduce.pool import LocalPool
from koala.reproduce.search import grow
from koala.runs import groups
from koala.runs.schema import IMMATERIAL
from koala.schema import valid
from koala.tables.load import find_specs, load_spec
from koala.tables.measured import collect, measured_path, read_measured
from koala.tables.publish import EXPERIMENTS, ROOT, Places, load_tables, publish
from koala.tables.spec import FULL
from koala.tables.terminal import show

EPILOG = """Runs that have a record are never run again, so the same command goes on where it was stopped or
killed; while another one is at work on the same runs, it shows that one's board. Exit status: 0, 1 when a run has
no record in the end, 2 bad input, 130 stopped."""
COLLECTED = ("data.path", "data.workers")  # beside what is immaterial: where the same data is, and who decodes it
ONE_RANK = {"num_gpus": ("auto", "0", "1"), "num_nodes": ("1",), "cpu_procs": ("1",)}  # as a table's own runs have


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="reproduce.py",
        epilog=EPILOG,
        description="Run what is missing of published tables, then render them.",
        allow_abbrev=False,  # a detached command starts itself again without --detach, and knows that spelling alone
    )
    made.add_argument(
        "arguments",
        nargs="+",
        metavar="TABLE | key=value",
        help="tables such as koala/table6, or all; and overrides of train.py for every run",
    )
    made.add_argument(
        "--profile", default=FULL, help="full (the paper's setting, default), smoke, or one of the table's own"
    )
    made.add_argument("--launcher", choices=("local", "slurm"), default="local")
    made.add_argument(
        "--jobs", type=int, help="local runs at a time (default: one a GPU or CPU core; 1 to compare times)"
    )
    made.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="e.g. partition=gpu")
    made.add_argument("--seeds", help="in place of the profile's, e.g. 1,2,3")
    made.add_argument("--data-path", action="append", default=[], metavar="DATA=DIR", help="local copy of a data set")
    made.add_argument("--output", default="outputs", help="run folders go here, tables into its folder tables/PROFILE")
    made.add_argument(
        "--dry-run", action="store_true", help="list runs, commands, blocked cells and what it would cost"
    )
    made.add_argument("--detach", action="store_true", help="go on in the background; the same command shows the board")
    made.add_argument(
        "--again", action="store_true", help="run what was recorded by older or uncommitted code again, too"
    )
    made.add_argument(
        "--measured", action="store_true", help="what stands in results/measured counts as run, wherever it was"
    )
    made.add_argument("--collect", action="store_true", help="append what was measured to results/measured")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_intermixed_args(arguments)
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        plan = _plan(options)
        progress = Progress(plan)
        path = _state_path(options, progress)  # before the search grows: the same command finds the same file
        while grow(plan):
            pass
        progress.extend()
        if options.dry_run:
            show_plan(plan, ROOT / "results" / "measured", console)
            return 0
        launcher = _launcher(options, plan)
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


def _plan(options: argparse.Namespace) -> Plan:
    known = find_specs(EXPERIMENTS)
    overrides = [text for text in options.arguments if "=" in text]
    names = [text for text in options.arguments if "=" not in text]
    names = known if names == ["all"] else list(dict.fromkeys(names))
    if not names:
        raise ConfigError(f"no table named; valid: all, {', '.join(known)}")
    options.names = names
    specs = [load_spec(EXPERIMENTS, name) for name in names]
    for text in overrides:
        _check_override(text, options.collect)
    seeds = None if options.seeds is None else _numbers("--seeds", options.seeds)
    data_paths = _pairs("--data-path", options.data_path)
    for data in data_paths.keys() - set(groups.options("data")):
        raise ConfigError(f"--data-path {data}={data_paths[data]}: {valid(data, groups.options('data'))}")
    if options.slurm and options.launcher != "slurm":
        raise ConfigError(f"--slurm {options.slurm[0]}: is for --launcher slurm; these runs would be local")
    if options.jobs is not None and options.launcher == "slurm":
        raise ConfigError(f"--jobs {options.jobs}: is for local runs; with Slurm --slurm array_parallelism=N")
    timed = [spec.name for spec in specs if spec.profile(options.profile).timed]
    if options.measured and timed:
        raise ConfigError(f"--measured: {timed[0]} compares times, which compare within one command: run all")
    measured = (row for name in known if options.measured for row in read_measured(ROOT / "results" / "measured", name))
    here = [] if options.output == "outputs" else [typed("output_root", options.output)]
    extra = [*here, *overrides]
    import torch  # late: --help is to be quick

    return make_plan(
        specs,
        options.profile,
        extra=extra,
        gpus=0 if options.launcher == "slurm" else min(1, torch.cuda.device_count()),
        seeds=seeds,
        data_paths=data_paths,
        again=options.again,
        measured=measured,
    )


def _check_override(text: str, collect: bool) -> None:
    """Refuses the override `text` of every run where it would do nothing, or put other numbers in a table's place."""
    key, _, value = text.lstrip("+").partition("=")
    if key == "seed":
        raise ConfigError(f"{text}: the runs of a cell differ in their seeds; valid: --seeds {value}")
    if collect and value not in ONE_RANK.get(key, (value,)):
        raise ConfigError(
            f"{text}: the number of ranks can change numbers, and --collect keeps those of one; leave out one of the "
            f"two; valid beside --collect: {key}={'|'.join(ONE_RANK[key])}"
        )
    if collect and key.partition(".")[0] not in IMMATERIAL and key not in COLLECTED:
        keys = ", ".join(sorted({*COLLECTED, *IMMATERIAL} - {"seed"}))
        raise ConfigError(
            f"{text}: can change numbers, and --collect keeps those of the table's own settings alone; leave out one "
            f"of the two; valid overrides beside --collect: {keys}"
        )


def _numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise ConfigError(f"{option} {text or repr(text)}: must be whole numbers below 10^9 such as 1,2,3")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"{option} {text}: must be NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def _launcher(options: argparse.Namespace, plan: Plan):
    """Who runs the plan. Tables that compare times get one run at a time if they are asked for by themselves; among
    others they are marked as not timed so."""
    if options.launcher == "slurm":
        from koala.reproduce.slurm import SlurmLauncher

        return SlurmLauncher(_pairs("--slurm", options.slurm))
    import torch

    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: must be 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    asked = [run.cfg.num_gpus for run in plan.runs]
    on_cpu = not gpus or all(count == 0 for count in asked)
    each = max((count for count in asked if isinstance(count, int)), default=1) or 1
    alone = bool(plan.timed) and len(plan.timed) == len(plan.tables())
    if alone and (options.jobs or 1) > 1:
        raise ConfigError(
            f"--jobs {options.jobs}: {', '.join(plan.timed)} compares times, which takes one run at a time; valid: 1"
        )
    jobs = options.jobs or (1 if alone else cores if on_cpu else max(1, gpus // each))
    if on_cpu:
        return LocalPool(jobs, _threads(cores, jobs))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or UUIDs; those of them that torch counts come first
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    shares = [[names[(slot * each + index) % gpus].strip() for index in range(each)] for slot in range(jobs)]
    return LocalPool(jobs, _threads(cores, jobs), [",".join(share) for share in shares])


def _threads(cores: int, jobs: int) -> int:
    """CPU threads of a worker: OMP_NUM_THREADS as everywhere, else the cores shared out."""
    said = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))  # of 4,2 (nested loops) the outer one
    return int(said[1]) if said else max(1, cores // jobs)


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
