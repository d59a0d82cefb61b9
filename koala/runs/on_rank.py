"""One rank's part of a run: data, folder, training, record."""

import errno
import os
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from koala import data as datasets
from koala import records
from koala.data import Data, Loading
from koala.errors import ConfigError, shown
from koala.metrics import reached
from koala.public import public
from koala.run_keys import PRETRAINED
from koala.runs.folder import RunFolder, move_aside
from koala.runs.identity import RunId, now, opening, segment
from koala.training import checkpoint
from koala.training.loop import Trainer
from koala.training.machine import prepare
from koala.training.monitor import Monitor
from koala.training.progress import Result
from koala.training.ranks import Ranks, join, launched_rank, ranks_now
from koala.training.stop import Stopped, requeue
from koala.training.workers import start

# A disk that is full, over quota or gone read-only, or a limit on the size of files (ulimit -f): not the run's failure,
# and no place for a record of one.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


# Where files are and how many devices there are, which may differ between nodes; what the files hold is in the hash.
OF_A_MACHINE = (
    "output_root",
    "data_root",
    "data.path",
    "data.tokenizer",
    "data.workers",
    *(f"model.{key}" for key in PRETRAINED),
    "num_gpus",
)


def begin(cfg: DictConfig, run_id: RunId, command: str | None) -> dict:
    """Starts or resumes the run on as many ranks as `cfg` asks for; see `launch`."""
    gpus = torch.cuda.device_count()
    if cfg.num_gpus != "auto" and cfg.num_gpus > gpus and not (launched_rank() and gpus == 1):  # one for each task
        raise ConfigError("num_gpus", cfg.num_gpus, f"this machine has {gpus}", valid=f"auto | 0 ... {gpus}")
    # A run of so many ranks is begun by so many; another number may resume it, and its record lists them
    here = ranks_now(cfg)
    if cfg.ranks != here and (cfg.rerun or not checkpoint.exists(run_id.folder / checkpoint.FOLDER)):
        gpus = f"num_gpus={cfg.ranks}, or " if torch.cuda.is_available() else ""
        reason = f"there is no checkpoint of such a run to resume, and {here} would begin it"
        raise ConfigError("ranks", cfg.ranks, reason, valid=f"ranks={here}, {gpus}num_gpus=0 cpu_procs={cfg.ranks}")
    try:
        return start(cfg, run, run_id, command)
    except Stopped as stop:
        requeue(stop)
        raise


def run(cfg: DictConfig, run_id: RunId, command: str | None) -> dict:
    """This rank's part of a run; every rank returns the record."""
    ranks = join(cfg)
    _refuse_other_runs(cfg, run_id, ranks)
    record = ranks.broadcast_object(opening(cfg, run_id, ranks, command) if ranks.is_main else None)
    prepare(ranks.device, cfg.precision, cfg.deterministic)
    data = _read_data(cfg, ranks)  # before there is a folder: here it shows whether the set is what `cfg` says
    if data.commit:  # a branch is no revision: it moves on
        record["data"]["revision"] = data.commit
    folder = _open_folder(cfg, run_id.folder, ranks)
    monitor = Monitor(cfg, record, folder.path, ranks.is_main)
    ended = None  # the record, once there is one: what is mirrored is closed once, with it or without
    try:
        trainer = Trainer(cfg, ranks, data, folder.path, monitor, segment(cfg, ranks, record))
        _resume(trainer, folder)
        ended = _record(trainer, record, trainer.fit())
        return ended
    except (ConfigError, Stopped):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise OSError(
                error.errno,
                f"{error.strerror}: output_root={cfg.output_root} cannot be written any more; the last checkpoint and "
                f"the rows in {folder.path} are intact, and the same command resumes from them once it can",
            ) from error
        if ranks.is_main:
            failure = {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}"[:2000],
                "finished": now(),
            }
            records.write_json(folder.path / records.RECORD, record | failure)
        raise
    finally:
        monitor.close(ended)
        if ranks.is_main:
            folder.release()


def _refuse_other_runs(cfg: DictConfig, run_id: RunId, ranks: Ranks) -> None:
    """Ranks train one run. The tasks of one srun that a person meant as runs of their own, each with its seed, would be
    taken for ranks, and train parts of different runs together.

    Raises:
        ConfigError: on every rank, naming a key that differs, other than where files are.
    """
    flat = {}
    for key, value in OmegaConf.to_container(cfg).items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    given = {key: value for key, value in flat.items() if key not in OF_A_MACHINE} | {"data": run_id.hash}
    first, *others = ranks.gather_objects(given)
    for rank, other in enumerate(others, 1):
        for key in first | other:
            if first.get(key) != other.get(key):
                reason = f"is {shown(other.get(key))} on rank {rank}; the tasks of one srun are the ranks of one run"
                valid = "one configuration for all; for a run in each task unset SLURM_PROCID before train.py"
                raise ConfigError(key, first.get(key), reason, valid=valid)


def _read_data(cfg: DictConfig, ranks: Ranks) -> Data:
    """The data set of a run, this rank's part of every batch.

    Raises:
        ConfigError: it is not what the configuration says, or has no validation split where one is needed.
    """
    data = datasets.build(
        cfg.data,
        Loading(
            cfg.seed,
            cfg.batch_size,
            cfg.eval_batch_size,
            rank=ranks.rank,
            world=ranks.world,
            accumulation=cfg.accumulation,
            device=ranks.device,
            data_root=Path(cfg.data_root),
        ),
    )
    if "val" not in data.evaluation and (cfg.select == "best-val" or cfg.schedule.name == "plateau"):
        reason = "has no validation split, which select=best-val and schedule=plateau go by"
        raise ConfigError("data", cfg.data.name, reason, valid="data.validation=N, which carves one")
    return data


def _restarted() -> bool:
    """Whether an elastic agent or a scheduler started this same run once more after a fault."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _open_folder(cfg: DictConfig, path: Path, ranks: Ranks) -> RunFolder:
    """The main rank takes the lock; all ranks hear what became of it."""
    folder, refusal = None, None
    if ranks.is_main:
        try:
            if cfg.rerun and not _restarted():
                RunFolder(path).release()  # not while another process works on it
                move_aside(path)
            folder = RunFolder(path)
            if not cfg.resume and checkpoint.exists(path / checkpoint.FOLDER) and not _restarted():
                valid = "resume=true, or rerun=true to move it aside"
                refusal = ConfigError("resume", False, f"{path} holds a checkpoint", valid=valid)
        except ConfigError as error:
            refusal = error
    _refuse_together(ranks, refusal)
    return folder or RunFolder(path, lock=False)


def _refuse_together(ranks: Ranks, refusal: ConfigError | None) -> None:
    """Raises the main rank's refusal, if any, on every rank: one that went on alone would wait for the others."""
    if refusal := ranks.broadcast_object(refusal):
        raise refusal


def _resume(trainer: Trainer, folder: RunFolder) -> None:
    """Resumes the last checkpoint, if there is one, with the rows that it counts."""
    ranks, refusal = trainer.ranks, None
    state = checkpoint.load(folder.path / checkpoint.FOLDER, ranks)
    if state is not None:
        trainer.load_state_dict(state)
    if ranks.is_main:
        try:
            folder.truncate_history(trainer.position.rows, trainer.position.measured)
        except ConfigError as error:
            refusal = error
    _refuse_together(ranks, refusal)


def _record(trainer: Trainer, opening: dict, result: Result) -> dict:
    """Writes the record of a run that has ended; every rank returns it."""
    ranks, rows = trainer.ranks, records.read_history(trainer.folder) if trainer.ranks.is_main else []
    end = {"targets": reached(rows, trainer.cfg.targets), "finished": now()}
    record = ranks.broadcast_object(public(opening | vars(result) | end))
    if ranks.is_main:
        records.write_json(trainer.folder / records.RECORD, record)
    ranks.barrier()
    return record
