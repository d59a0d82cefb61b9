"""What a run trains: network, optimizer, schedule, and the step and evaluation that its task brings."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from koala import models
from koala.data.base import Data, generator
from koala.training import checkpoint, parallel
from koala.training.machine import Arithmetic
from koala.training.optimizers import build_schedule, filter_of, needs_of
from koala.training.ranks import Ranks
from koala.training.tasks import build_task


class Learner:
    """Everything that learns, on this rank, and its state.

    Args:
        data: this rank's part of it.
        between_batches: called between two batches of evaluation; may raise.
        folder: the run's.

    Raises:
        ConfigError: data and model do not fit each other.
    """

    def __init__(
        self, cfg: DictConfig, ranks: Ranks, data: Data, between_batches: Callable[[], None], folder: Path
    ) -> None:
        self.ranks = ranks
        self.task = task = build_task(cfg, data.num_classes)
        torch.manual_seed(generator(cfg.seed, "weights").initial_seed())
        shapes = {name: getattr(data, name) for name in ("kind", "num_classes", "input_shape", "vocabulary")}
        module = models.build(cfg.model, **shapes)
        if cfg.sync_bn:
            module = parallel.synchronised(module, ranks)
        flat = needs_of(cfg.optim).contiguous or (cfg.strategy == "fsdp" and ranks.world > 1)  # FSDP takes no other
        last = cfg.channels_last and data.kind == "images" and not flat
        self.arithmetic = arithmetic = Arithmetic.of(cfg.precision, ranks.device, module, channels_last=last)
        self.module = module = module.to(ranks.device, arithmetic.dtype, memory_format=arithmetic.memory_format)
        net = parallel.distribute(module, ranks, cfg.strategy, cfg.compile)
        self.optimizer = task.build_optimizer(cfg, module)
        self.filter = filter_of(self.optimizer)
        self.schedule, self.schedule_by = build_schedule(
            cfg.schedule, self.optimizer, cfg.epochs, data.train.steps_per_epoch
        )
        self.step = task.build_step(cfg, ranks, arithmetic, module, net, self.optimizer)
        self.evaluation = task.build_evaluation(cfg, ranks, arithmetic, data, module, between_batches, folder)

    @property
    def trained_parameters(self) -> int:
        """How many weights have gradients."""
        return sum(weight.numel() for weight in self.module.parameters() if weight.requires_grad)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state: of one copy, however sharded."""
        return _bytes(self.optimizer.state_dict())

    def diagnostics(self) -> dict[str, torch.Tensor]:
        """What a filter estimates, by name; nothing for other optimizers."""
        return self.filter.diagnostics() if self.filter is not None else {}

    def state_dict(self) -> dict:
        """The state at a step boundary (a collective). Tensors may be the learner's own."""
        return {
            "model": self.module.state_dict(),
            "optimizer": parallel.optimizer_state(self.module, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "task": self.task.state_dict(self.ranks),
            "evaluation": self.evaluation.state_dict(),
            "selected": self.evaluation.selected,
        }

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict` (a collective).

        Args:
            state: of any number of ranks, as `checkpoint.load` gave it.
        """
        if sharded := bool(state["shards"]):
            like = {
                "model": self.module.state_dict(),
                "optimizer": get_optimizer_state_dict(self.module, self.optimizer),
            }
            if state.get("selected") is not None:
                like["selected"] = parallel.cpu_copy(self.module.state_dict())
            state = checkpoint.fill(state, like)
        self.module.load_state_dict(parallel.sharded_for(state["model"], self.module))
        parallel.load_optimizer_state(self.module, self.optimizer, state["optimizer"], named=sharded)
        self.schedule.load_state_dict(state["schedule"])
        self.task.load_state_dict(state["task"], self.ranks)
        self.evaluation.load_state_dict(state["evaluation"])
        self.evaluation.selected = state["selected"]


def _bytes(state: object) -> int:
    """Of the tensors in `state`, nested in dictionaries and lists; a sharded tensor counts whole."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes, parts))
