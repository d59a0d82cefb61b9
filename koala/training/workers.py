"""Workers: a run gets as many ranks as it asks for, hears of signals through its parent, and ends with it."""

import ctypes
import os
import signal
import sys
import threading
import uuid
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from koala.errors import ConfigError
from koala.terminal import protect_streams
from koala.training.ranks import gpus_per_node, launched_rank
from koala.training.stop import Stopped, stop_signal


def start(cfg: DictConfig, run, *arguments) -> dict:
    """Calls `run(cfg, *arguments)` on every rank the run asks for and returns the main rank's record.

    Ranks that exist already (torchrun, srun) are used; else workers are started here. `run` must be importable by name.

    Raises:
        ConfigError: several nodes are asked for but nothing started ranks on them; or the workers raised it.
        Stopped: a signal told this process or its workers to stop.
        RuntimeError: a worker failed or was killed; names the first and its error.
    """
    workers = gpus_per_node(cfg) or cfg.cpu_procs
    launched = launched_rank()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may be killed, also by a signal that it does not expect (USR1)
        _end_with_parent(signal.SIGTERM)
    with stop_signal.listening(person=launched is None):
        if launched is not None or workers == 1 and cfg.num_nodes == 1:
            return run(cfg, *arguments)
        if cfg.num_nodes > 1:
            reason = "this process can only start workers on its own machine"
            valid = "one process a rank, started with torchrun or srun, or hydra/launcher=slurm"
            raise ConfigError("num_nodes", cfg.num_nodes, reason, valid=valid)
        return _start_here(cfg, workers, run, arguments)


def _start_here(cfg: DictConfig, workers: int, run, arguments: tuple) -> dict:
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=cfg.max_restarts,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # the others are `stop_signal`'s
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // workers)))
    _shield_tracker()
    sys.stdout.flush()
    try:
        results = elastic_launch(launch_config, _worker)(
            run, OmegaConf.to_container(cfg, resolve=True), arguments, stop_signal.shared
        )
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        text = failure.message["message"] if isinstance(failure.message, dict) else failure.message  # a killed rank's
        raise RuntimeError(f"rank {rank} failed: {text}") from None
    outcome, value = results[0]
    if outcome == "bad input":
        raise value
    if outcome == "stopped":
        raise Stopped(*value)
    return value


def _shield_tracker() -> None:
    """Starts multiprocessing's resource tracker, which ignores Ctrl-C, so that it ignores a lost terminal as well."""
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resource_tracker.ensure_running()
        signal.signal(signal.SIGHUP, before)


def _end_with_parent(signum: int) -> None:
    """Has the kernel send this rank `signum` when its parent is gone: an orphan would hold the run's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG


def _worker(run, cfg: dict, arguments: tuple, shared) -> tuple:
    """`run` in a process of its own; what a person is to read goes back as a value: the agent prints tracebacks."""
    _end_with_parent(signal.SIGKILL)
    protect_streams()
    with stop_signal.obeying(shared):
        try:
            return "record", run(OmegaConf.create(cfg), *arguments)
        except ConfigError as error:
            return "bad input", error
        except Stopped as stop:
            return "stopped", (stop.signum, stop.step)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
