"""What a checkpoint of a run holds, and how a run goes on from it."""

import os
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from koala.errors import ConfigError
from koala.training import checkpoint, parallel
from koala.training.clock import PHASES, Clock


@dataclass
class Position:
    """Where a run is: `epoch` epochs done and `index` steps of the next, `step` steps and `rows` evaluations in all."""

    epoch: int = 0
    index: int = 0
    step: int = 0
    rows: int = 0
    measured: int = -1  # step of the last row
    owes_row: bool = False  # an epoch has ended and is yet to be evaluated


def segments(trainer) -> list[dict]:
    """What the record says of each process that did a part of this run, this one last (koala/records.py)."""
    own = {
        "from": trainer.began,
        "to": trainer.position.step,
        "backend": getattr(trainer.filter, "backend", None),
        "load": [trainer.load, os.getloadavg()[0]],
        "seconds": dict(trainer.clock.seconds),
        "step_ms": trainer.clock.step_ms,
    }
    return [*trainer.earlier, trainer.segment | own]


def state_of(trainer) -> dict:
    """The state of a `Trainer` at a step boundary, by part (a collective); tensors may be its own."""
    return {
        "config_hash": trainer.monitor.config_hash,
        "position": vars(trainer.position).copy(),
        "model": trainer.module.state_dict(),
        "optimizer": parallel.optimizer_state(trainer.module, trainer.optimizer),
        "schedule": trainer.schedule.state_dict(),
        "tally": trainer.ranks.sum(trainer.tally.clone()).cpu(),
        "task": trainer.task.state_dict(trainer.ranks),
        "evaluation": trainer.evaluation.state_dict(),
        "selected": trainer.evaluation.selected,
        "segments": segments(trainer),
    }


def restore(trainer, state: dict) -> None:
    """Has `trainer` go on from a checkpoint's state, as `checkpoint.load` gave it (a collective).

    Raises:
        ConfigError: it belongs to another configuration, or its content is not what `state_of` gives.
    """
    if state.get("config_hash") != trainer.monitor.config_hash:
        raise ConfigError(
            f"checkpoint in {trainer.folder} has config_hash={state.get('config_hash')}, this run "
            f"{trainer.monitor.config_hash}; rerun=true starts again and moves it aside"
        )
    if sharded := bool(state["shards"]):
        here = {
            "model": trainer.module.state_dict(),
            "optimizer": get_optimizer_state_dict(trainer.module, trainer.optimizer),
        }
        if state.get("selected") is not None:
            here["selected"] = parallel.copied(trainer.module.state_dict())
        state = checkpoint.fill(state, here)
    try:
        _load(trainer, state, sharded)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise checkpoint.refusal(state["path"], error) from None


def _load(trainer, state: dict, sharded: bool) -> None:
    position = Position(**state["position"])
    trainer.module.load_state_dict(parallel.cut(state["model"], trainer.module))
    parallel.load_optimizer_state(trainer.module, trainer.optimizer, state["optimizer"], named=sharded)
    trainer.schedule.load_state_dict(state["schedule"])
    _require_like(state["tally"], trainer.tally)
    if trainer.ranks.is_main:
        trainer.tally.copy_(state["tally"])
    trainer.task.load_state_dict(state["task"], trainer.ranks)
    trainer.evaluation.load_state_dict(state["evaluation"])
    trainer.evaluation.selected = state["selected"]
    trainer.position = position
    trainer.earlier, trainer.began = list(state["segments"]), position.step
    seconds = {phase: sum(float(part["seconds"][phase]) for part in trainer.earlier) for phase in PHASES}
    trainer.clock = Clock(trainer.ranks.device, seconds)
    trainer.writer.saved = position.step
    trainer.monitor.resumed(position.step)


def _require_like(tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"a tally of {tuple(tensor.shape)} {tensor.dtype}, not {tuple(like.shape)} {like.dtype}")
