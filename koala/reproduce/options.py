"""What is asked of scripts/reproduce.py: its options, the plan that they make, and who runs it."""

import argparse
import os
import re

from koala.errors import ConfigError
from koala.reproduce.plan import Plan, make_plan, typed
from koala.reproduce.pool import LocalPool
from koala.runs import groups
from koala.runs.schema import IMMATERIAL
from koala.schema import valid
from koala.tables.load import find_specs, load_spec
from koala.tables.measured import read_measured
from koala.tables.publish import EXPERIMENTS, ROOT
from koala.tables.spec import FULL

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


def plan_of(options: argparse.Namespace) -> Plan:
    """What is to be run; `options.names` becomes the tables that are asked for.

    Raises:
        ConfigError: an option is wrong, or does not go with another.
    """
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


def launcher_of(options: argparse.Namespace, plan: Plan):
    """Who runs the plan. Tables that compare times get one run at a time if they are asked for by themselves; among
    others they are marked as not timed so.

    Raises:
        ConfigError: an option is wrong, or does not go with the tables.
    """
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
