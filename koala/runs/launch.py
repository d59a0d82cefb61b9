"""One run from configuration to record: `launch` is what both doors call."""

import math
import sys

from omegaconf import DictConfig, OmegaConf

from koala import records
from koala.errors import ConfigError
from koala.metrics import reached
from koala.runs.compose import build_dry
from koala.runs.identity import RunId, folder_of, identify, remarks
from koala.training.ranks import launched_rank


def find_record(cfg: DictConfig) -> dict | None:
    """The record of this run if it came to an end (finished or diverged), else None; its targets are those of `cfg`.

    Raises:
        ConfigError: the record cannot be read, or is that of another run.
    """
    return _ended(cfg, identify(cfg))


def _ended(cfg: DictConfig, run_id: RunId) -> dict | None:
    again = "rerun=true moves the run's folder aside and starts again"
    try:
        record = records.read_record(run_id.folder)
        if record is None or record["status"] not in records.ENDED:
            return None
        targets = OmegaConf.to_container(cfg.targets) if cfg.targets else {}
        record["targets"] = reached(records.read_history(run_id.folder), targets) if targets else {}
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{error.reason}; {again}", valid=error.valid) from None
    if (record["config_hash"], record["seed"]) != (run_id.hash, cfg.seed):
        other = f"{record['name']} {record['config_hash']} seed {record['seed']}"
        raise ConfigError(run_id.folder, None, f"holds the record of another run ({other}); move it, or {again}")
    return record


def launch(cfg: DictConfig, command: str | None = None) -> dict:
    """Runs, resumes, or finds finished the run that `cfg` (from `compose`) describes, on as many ranks as it asks for.

    Args:
        command: what a person would type to get this run, for the record; default: this process's command line.

    Returns:
        The run's record (see koala/records.py); status "finished" or "diverged".

    Raises:
        ConfigError: the input is bad; nothing was written.
        Stopped: a signal told it to stop; the same call resumes from the checkpoint.
    """
    run_id = identify(cfg)
    if not cfg.rerun and (record := _ended(cfg, run_id)) is not None:
        for line in remarks(record) if _speaks() else ():
            print(line, file=sys.stderr)
        return record
    build_dry(cfg)
    from koala.runs.on_rank import begin  # here: it imports all of training

    return begin(cfg, run_id, command)


def _speaks() -> bool:
    """Whether this process prints for the ranks that a launcher started; each of them has the record."""
    return not (launched_rank() or {}).get("RANK")


def report(record: dict, root: str) -> None:
    """Prints the results of a run below the `output_root` that is given, once for all ranks."""
    if not _speaks():
        return
    path = folder_of(root, record["name"], record["config_hash"], record["seed"])
    final = "  ".join(
        f"{key} {value:.4g}"
        for key, value in record["metrics"]["final"].items()
        if not key.startswith("filter_") and isinstance(value, float)
    )
    print(
        f"{record['name']} seed {record['seed']}: {record['status']} after {record['epochs']:g} epochs, "
        f"{record['seconds']['train']:.1f} s of training\n{final}\n{path / records.RECORD}"
    )
    if record["status"] == "diverged":
        print(record["error"], file=sys.stderr)


def objective(record: dict, metric: str) -> float:
    """What a sweeper is to minimise: `metric` of the final row; infinity if the run diverged, or its value is no
    number."""
    value = None if record["status"] == "diverged" else record["metrics"]["final"].get(metric)
    return math.inf if value is None else value
