"""The options of scripts/reproduce.py: the plan that they make, and what launches its runs."""

import argparse
import os
import re

import torch

from koala.errors import ConfigError
from koala.reproduce.local import LocalLauncher
from koala.reproduce.plan import Plan, typed
from koala.reproduce.slurm import SlurmLauncher
from koala.run_keys import IMMATERIAL
from koala.runs.schema import options as names
from koala.tables.cli import EXPERIMENTS, RESULTS
from koala.tables.experiment import find_experiments, load_experiment
from koala.tables.measured import read_measured
from koala.tables.parts import FULL, one_of
from koala.tables.stats import FEWEST

EPILOG = """Runs that have a record are never run again, so the same command resumes what was stopped or killed; while
another one works on the same runs, it waits. Exit status: 0, 1 when a run has no record in the end, 2 bad input, 130
stopped."""
COLLECTED = ("data.path", "data.workers")  # beside IMMATERIAL: where the same data is, and who decodes it
ONE_RANK = {"num_gpus": ("auto", "0", "1"), "num_nodes": ("1",), "cpu_procs": ("1",)}  # as a table's own runs have


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options in `arguments`, with `names` of tables and `overrides` of train.py.

    Raises:
        ConfigError: no table is named, or an option is wrong or does not go with another.
    """
    parser = argparse.ArgumentParser(
        prog="reproduce.py", epilog=EPILOG, description="Run the missing runs of published tables and render these."
    )
    add = parser.add_argument
    add("arguments", nargs="+", metavar="TABLE | key=value",
        help="tables such as koala/table6, or all; and overrides of train.py for every run")  # fmt: skip
    add("--profile", default=FULL, help="full (the paper's setting, default), smoke, or one of the table's own")
    add("--launcher", choices=("local", "slurm"), default="local")
    add("--jobs", type=int, help="local runs at a time (default: one a GPU or CPU core; 1 to compare times)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="e.g. partition=gpu")
    add("--seeds", help="in place of the profile's, e.g. 1,2,3")
    add("--only", action="append", default=[], metavar="AXIS=VALUE[,VALUE]", help="these cells, e.g. optim=sgd,koala-m")
    add("--data-path", action="append", default=[], metavar="DATA=DIR", help="local copy of a data set")
    add("--output", default="outputs", help="run folders go here, tables into its folder tables/PROFILE")
    add("--dry-run", action="store_true", help="list runs, commands, blocked cells and their cost")
    add("--again", action="store_true", help="also repeat runs of another numerics version or of uncommitted code")
    add("--measured", action="store_true", help="rows in results/measured, of any machine, count as records")
    add("--collect", action="store_true", help="append the records to results/measured")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [text for text in options.arguments if "=" in text]
    options.names = list(dict.fromkeys(text for text in options.arguments if "=" not in text))
    if options.names == ["all"]:
        options.names = find_experiments(EXPERIMENTS)
    if not options.names:
        raise ConfigError("TABLE", None, "none is named", valid=["all", *find_experiments(EXPERIMENTS)])
    for text in options.overrides:
        _check_override(text, options.collect)
    if options.seeds is not None:
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", options.seeds):
            raise ConfigError("--seeds", options.seeds, "is no list of seeds", valid="whole numbers below 10^9: 1,2,3")
        options.seeds = list(dict.fromkeys(map(int, options.seeds.split(","))))
    options.only = {axis: values.split(",") for axis, values in _pairs("--only", options.only).items()}
    options.data_paths = _pairs("--data-path", options.data_path)
    for data in options.data_paths:
        one_of("--data-path", data, names("data"))
    if options.slurm and options.launcher != "slurm":
        raise ConfigError("--slurm", options.slurm[0], "is for --launcher slurm; these runs would be local")
    options.slurm = _pairs("--slurm", options.slurm)
    if options.jobs is not None and options.launcher == "slurm":
        raise ConfigError("--jobs", options.jobs, "is for local runs", valid="--slurm array_parallelism=N")
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError("--jobs", options.jobs, "is too few", valid="1 or more")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    """The runs of the tables; `options.jobs` becomes 1 for tables that are named to compare times.

    Raises:
        ConfigError: an option does not go with a table, or a table's file is wrong.
    """
    specs = [load_experiment(EXPERIMENTS, name) for name in options.names]
    timed = []
    for spec in specs:
        profile = spec.profile(options.profile)  # one that only shows that cells run has too few seeds to compare times
        if profile.timed and (profile.comparable or len(options.seeds or profile.seeds) >= FEWEST):
            timed.append(spec.name)
    if timed and options.measured:
        raise ConfigError("--measured", None, f"{timed[0]} compares times, which compare within one command: run all")
    if timed and len(timed) == len(specs):  # among others its times are marked
        if (options.jobs or 1) > 1:
            reason = f"{', '.join(timed)} compares times, which takes one run at a time"
            raise ConfigError("--jobs", options.jobs, reason, valid="1")
        options.jobs = 1
    tables = find_experiments(EXPERIMENTS) if options.measured else ()
    output = [] if options.output == "outputs" else [typed("output_root", options.output)]
    return Plan(
        specs,
        options.profile,
        extra=[*output, *options.overrides],
        gpus=0 if options.launcher == "slurm" else min(1, torch.cuda.device_count()),
        seeds=options.seeds,
        only=options.only,
        data_paths=options.data_paths,
        again=options.again,
        measured=[row for table in tables for row in read_measured(RESULTS / "measured", table)],
    )


def _check_override(text: str, collect: bool) -> None:
    """Refuses the override `text` of every run where it would do nothing, or would change the numbers of a table."""
    key, _, value = text.lstrip("+").partition("=")
    if key == "seed":
        raise ConfigError(key, value, "the runs of a cell differ in their seeds", valid=f"--seeds {value}")
    harmless = key in COLLECTED or key.partition(".")[0] in IMMATERIAL
    if collect and not (value in ONE_RANK[key] if key in ONE_RANK else harmless):
        ranks = [f"{name}={'|'.join(values)}" for name, values in ONE_RANK.items()]
        keys = ", ".join(sorted({*COLLECTED, *IMMATERIAL} - {"seed", *ONE_RANK}) + ranks)
        reason = "can change numbers, and --collect keeps those of the table's own settings, of one rank"
        raise ConfigError(key, value, f"{reason}; leave out one of the two", valid=f"beside --collect {keys}")


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(option, text, "has no value", valid="NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def launcher_of(options: argparse.Namespace, plan: Plan) -> LocalLauncher | SlurmLauncher:
    """What launches the runs of the plan."""
    if options.launcher == "slurm":
        return SlurmLauncher(options.slurm)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus, counts = torch.cuda.device_count(), [run.cfg.num_gpus for run in plan.runs]
    each = max((count for count in counts if isinstance(count, int)), default=1) or 1
    on_gpus = gpus and any(count != 0 for count in counts)
    jobs = options.jobs or (max(1, gpus // each) if on_gpus else cores)
    # CPU threads of a worker: OMP_NUM_THREADS as everywhere (of 4,2, nested loops, the outer one), else a share.
    given = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    threads = int(given[1]) if given else max(1, cores // jobs)
    if not on_gpus:
        return LocalLauncher(jobs, threads)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or UUIDs; those of them that torch counts come first
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    shares = [[names[(slot * each + index) % gpus].strip() for index in range(each)] for slot in range(jobs)]
    return LocalLauncher(jobs, threads, [",".join(share) for share in shares])
