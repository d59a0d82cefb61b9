"""Trains one network with one optimizer. `python train.py --help` explains every key."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import UncompletedJobError

from koala.cluster import refusal
from koala.errors import ConfigError
from koala.runs import Stopped, launch, run_dir
from koala.runs.command_line import command_line
from koala.runs.compose import PRIMARY, bad_input, check, check_sweep, register
from koala.runs.launch import objective, report
from koala.training.monitor import protect_streams


@hydra.main(version_base="1.3", config_path="configs", config_name=PRIMARY)
def main(cfg: DictConfig) -> float | None:
    """One run; under --multirun one of many, where a diverged run does not end the others. Returns its objective."""
    try:
        cfg = check(cfg, typed=OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))
        record = launch(cfg)
        report(record, run_dir(cfg))
    except ConfigError as error:  # left through SystemExit, which Hydra lets pass without a traceback
        sys.exit(bad_input(error))
    except OSError as error:  # the disk; a person can mend it
        sys.exit(str(error))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except Exception as error:
        error.of_a_run = True  # and so no bad input, also where it comes back from a job
        raise
    if record["status"] == "diverged" and HydraConfig.get().mode == RunMode.RUN:
        sys.exit(3)
    return objective(record, cfg.objective)


if __name__ == "__main__":
    protect_streams()
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        sys.argv[1:] = command_line(sys.argv[1:])
        check_sweep(sys.argv[1:])
        main()
    except UncompletedJobError as error:  # sbatch took none, which is its cause, or one left no result and says why
        sys.exit(bad_input(refusal(error)) if error.__cause__ else str(error))
    except KeyboardInterrupt:  # before a run, or while jobs are waited for, which stay in the queue
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "of_a_run"):
            raise
        sys.exit(bad_input(error))
