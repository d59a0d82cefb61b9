"""Sweeps: every run is checked before the first is trained, and the end names those that have no result."""

import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from koala import records
from koala.errors import ConfigError
from koala.runs.compose import build_dry, check
from koala.runs.identity import identify
from koala.runs.launch import report
from koala.runs.overrides import PRIMARY, hydra_config, parsed_sweep
from koala.training.tasks import metric_keys

RESULTS = "optimization_results.yaml"  # what Hydra's optimizing sweepers write into the sweep's folder
DIVERGED = 3  # exit status


@dataclass(frozen=True)
class Sweep:
    """A sweep before it begins; one run is no sweep.

    Args:
        runs: {overrides in which it differs: configuration} of every run, where the command line lists them.
        jobs: whether they are Slurm's, so that what each printed is in its log alone.
        results: the file in which a sweeper that chooses the runs (Optuna) says which was best.
    """

    runs: dict[str, DictConfig] = field(default_factory=dict)
    jobs: bool = False
    results: Path | None = None

    def status(self) -> int:
        """Prints which runs have no result, or that none has a finite one; returns the exit status, 0 without fault.
        Prints the results of jobs."""
        missing = []
        for name, cfg in self.runs.items():
            try:
                folder = identify(cfg).folder
            except ConfigError:  # its data lies where its job was, not here
                continue
            if (record := _result(folder)) is None:
                missing.append(name)
            elif self.jobs:
                report(record, cfg.output_root)
        if missing:
            print(f"{len(missing)} of {len(self.runs)} runs have no result: {'; '.join(missing)}", file=sys.stderr)
            return 1
        if self.results is not None and self.results.exists():
            best = OmegaConf.load(self.results).get("best_value")
            if isinstance(best, float) and not math.isfinite(best):
                print(f"{self.results}: every trial diverged; there is no best one", file=sys.stderr)
                return DIVERGED
        return 0


def _result(folder: Path) -> records.Ended | None:
    try:
        record = records.read_record(folder)
    except ConfigError:
        return None
    return record if record is not None and record["status"] in records.ENDED else None


def check_sweep(arguments: Sequence[str]) -> Sweep:
    """Checks every run of a sweep (`-m` among the arguments of train.py) before the first of them is begun.

    Only where the command line lists all of them: not where a sweeper chooses (Optuna), of which the objective alone
    is checked, or another primary configuration does.

    Raises:
        ConfigError: of the first run that is refused; or there is one run, which no launcher gets.
    """
    options = get_args_parser().parse_args(list(arguments))
    given = options.overrides
    if not (options.multirun or "hydra.mode=MULTIRUN" in given):
        for text in given:
            if re.match(r"\W*hydra[./](launcher|sweeper)", text):
                raise ConfigError(text, None, "is for sweeps, and without -m this is one run, here", valid="-m as well")
        return Sweep()
    if options.config_path or options.config_name not in (None, PRIMARY) or options.info or options.cfg:
        return Sweep()
    try:
        parsed = parsed_sweep(given, options.config_dir)
        if any(one.key_or_group == "hydra/sweeper" and one.value() != "basic" for one in parsed):
            return _check_search(parsed, options.config_dir)
        of_runs = [one for one in parsed if not one.is_hydra_override() or one.key_or_group == "hydra.searchpath"]
        values = {one.get_key_element(): _choices(one) for one in of_runs}
    except HydraException:  # no overrides, or a sweep (interval) that only another sweeper can list
        return Sweep()
    varied = {key for key, choices in values.items() if len(choices) > 1}
    runs = {}
    for chosen in itertools.product(*values.values()):
        run = [f"{key}={value}" for key, value in zip(values, chosen, strict=True)]
        name = " ".join(text for text in run if text.rpartition("=")[0] in varied or text.partition("=")[0] in varied)
        runs[name] = check(hydra_config(run, options.config_dir), typed=[*given, *run])
        build_dry(runs[name])
    return Sweep(runs, jobs=any("slurm" in str(one.value()) for one in parsed if one.key_or_group == "hydra/launcher"))


def _choices(one: Override) -> list[str]:
    """What a sweep gives to the key of an override, one value a run; the same to all of them if it does not sweep."""
    return list(one.sweep_string_iterator()) if one.is_sweep_override() else [one.get_value_element_as_str()]


def _check_search(parsed: list[Override], config_dir: str | None) -> Sweep:
    """Of a sweeper that chooses the runs: whether they will have the objective that it minimises.

    Raises:
        ConfigError: no run has it, or it is to be maximised.
    """
    fixed = [one.input_line for one in parsed if not one.is_sweep_override()]
    cfg = hydra_config(fixed, config_dir, return_hydra_config=True)
    if "maximize" in str(cfg.hydra.sweeper.get("direction") or ""):
        reason = "every metric is better lower, and a run that diverged counts as infinite"
        raise ConfigError("hydra.sweeper.direction", "maximize", reason, valid="minimize")
    results = Path(cfg.hydra.sweep.dir) / RESULTS
    OmegaConf.set_struct(cfg, False)
    columns = metric_keys(cfg)
    if cfg.objective not in columns:
        raise ConfigError("objective", cfg.objective, "the runs have no such metric", valid=columns)
    return Sweep(results=results)
