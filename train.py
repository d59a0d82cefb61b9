"""Trains one network with one optimizer. `python train.py --help` explains every key."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from koala.errors import ConfigError
from koala.training import Stopped, config, launch
from koala.training.monitor import protect_streams
from koala.training.run import report


@hydra.main(version_base="1.3", config_path="configs", config_name=config.PRIMARY)
def main(cfg: DictConfig) -> None:
    """One run; under --multirun one of many, where a diverged run does not end the others."""
    try:
        record = launch(config.check(cfg))
    except ConfigError as error:  # left through SystemExit, which Hydra lets pass without a traceback
        sys.exit(config.bad_input(error))
    except OSError as error:  # the disk; a person can mend it
        sys.exit(str(error))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    report(record)
    if record["status"] == "diverged" and HydraConfig.get().mode == RunMode.RUN:
        sys.exit(3)


if __name__ == "__main__":
    protect_streams()
    config.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors instead of printing them
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(config.bad_input(error))
