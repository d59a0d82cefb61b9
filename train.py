"""Trains one network with one optimizer. `python train.py --help` explains every key."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from koala.runs import Stopped, launch
from koala.runs.compose import check
from koala.runs.exit import exit_status
from koala.runs.launch import objective, report
from koala.runs.overrides import PRIMARY, command_line, help_text
from koala.runs.sweep import DIVERGED, check_sweep
from koala.terminal import protect_streams


@hydra.main(version_base="1.3", config_path="configs", config_name=PRIMARY)
def main(cfg: DictConfig) -> float | None:
    """One run; under --multirun one of many, which neither diverging nor failing ends. Returns its objective."""
    alone = HydraConfig.get().mode == RunMode.RUN
    try:
        cfg = check(cfg, typed=OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))
        record = launch(cfg)
        report(record, cfg.output_root)
    except (Exception, Stopped) as error:
        error.of_a_run = True  # also where it comes back from a job
        if alone or isinstance(error, Stopped):  # a signal also ends a sweep
            sys.exit(exit_status(error))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise
    if alone and record["status"] == "diverged":
        sys.exit(DIVERGED)
    return objective(record, cfg.objective)


if __name__ == "__main__":
    protect_streams()
    if {"-h", "--help"} & {*sys.argv[1:]}:
        sys.exit(print(help_text()))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    sweep = None
    try:
        sys.argv[1:] = command_line(sys.argv[1:])
        sweep = check_sweep(sys.argv[1:])
        main()
        status = sweep.status()
    except BaseException as error:
        if sweep is not None and hasattr(error, "of_a_run"):
            sweep.status()
        status = exit_status(error)
    sys.exit(status)
