"""Optimizer, wrapper and schedule from their configurations."""

import copy

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, update_bn

from koala.errors import ConfigError

# Keys of configs/optim/*.yaml that speak to the suite, not to the optimizer's constructor.
# `create_graph`: the optimizer differentiates the gradient once more (AdaHessian).
# `contiguous`: it views weights as flat, which the channels-last layout does not allow (L-BFGS, AdamP).
# `module`: it watches or sorts the network's layers, so it takes the module in place of the weights (AdaFisher, Muon).
# `kind`: the only kind of model that it takes (K-FAC: vision).
SUITE_KEYS = ("name", "_target_", "_partial_", "create_graph", "contiguous", "module", "kind")


def constructor_arguments(optim: DictConfig) -> dict:
    """Keyword arguments of the optimizer's constructor."""
    arguments = OmegaConf.to_container(optim, resolve=True)
    arguments = {key: value for key, value in arguments.items() if key not in SUITE_KEYS}
    # Optimizers check tuples such as betas by type or unpack them; YAML has only lists.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def build_optimizer(optim: DictConfig, wrapper: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `model`'s trainable parameters, inside Lookahead if asked for."""
    if (
        optim.get("create_graph", False)
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ConfigError(
            f"optim={optim.name}: differentiates the gradient, which averaging over ranks cuts off; use one rank"
        )
    given = model
    if not optim.get("module", False):
        given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = get_class(optim._target_)(given, **constructor_arguments(optim))
    if wrapper.name == "lookahead":
        from pytorch_optimizer import Lookahead

        return Lookahead(optimizer, k=wrapper.k, alpha=wrapper.alpha)
    return optimizer


class WeightAverage:
    """SWA: an equal average of the weights after some epochs, used for evaluation once it holds any.

    Args:
        model: the module being trained (not a DDP wrapper).
        start: epoch from which on the weights are averaged.
        every: epochs between two additions.
    """

    def __init__(self, model: nn.Module, start: int, every: int):
        self.average = AveragedModel(model)
        self.start, self.every = start, every

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Adds the weights if `epoch` (counted from 1) is one to average."""
        if epoch >= self.start and (epoch - self.start) % self.every == 0:
            self.average.update_parameters(model)

    def evaluated(self, model: nn.Module, batches) -> nn.Module:
        """What to evaluate: the average with BatchNorm statistics of `batches` (inputs), or `model` before it began."""
        if int(self.average.n_averaged) == 0:
            return model
        averaged = copy.deepcopy(self.average)  # the average itself goes on without this epoch's statistics
        update_bn(batches, averaged)
        return averaged


def milestones(schedule: DictConfig, epochs: int) -> list[int]:
    """Milestones in epochs for a run of `epochs`: the tabulated ones, or those of the nearest length, scaled."""
    table = schedule.milestones
    if OmegaConf.is_list(table) or isinstance(table, (list, tuple)):
        return [int(epoch) for epoch in table]
    table = {int(length): list(values) for length, values in table.items()}
    if not table:
        raise ConfigError(
            "schedule=step: schedule.milestones is empty; give epochs, e.g. schedule.milestones=[30,60,90]"
        )
    length = min(table, key=lambda length: (abs(length - epochs), length))
    return [round(milestone * epochs / length) for milestone in table[length]]


def build_schedule(schedule: DictConfig, optimizer: Optimizer, epochs: int, steps_per_epoch: int):
    """A torch scheduler and whether it steps per epoch ("epoch"), per step ("step") or on validation ("plateau")."""
    if schedule.name == "step":
        return schedulers.MultiStepLR(optimizer, milestones(schedule, epochs), schedule.gamma), "epoch"
    if schedule.name == "plateau":
        return schedulers.ReduceLROnPlateau(
            optimizer, factor=schedule.gamma, patience=schedule.patience, threshold=0.0
        ), "plateau"
    if schedule.name == "cosine":
        if schedule.by not in ("step", "epoch"):
            raise ConfigError(f"schedule.by={schedule.by}: valid: step, epoch")
        unit = 1 if schedule.by == "epoch" else steps_per_epoch
        total, warmup = (schedule.length or epochs) * unit, round(schedule.warmup * unit)
        rates = [group["lr"] for group in optimizer.param_groups]
        floor = schedule.final * float(rates[0])
        cosine = schedulers.CosineAnnealingLR(optimizer, max(1, total - warmup), eta_min=floor)
        if warmup == 0:
            return cosine, schedule.by
        rise = schedulers.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
        return schedulers.SequentialLR(optimizer, [rise, cosine], milestones=[warmup]), schedule.by
    return schedulers.LambdaLR(optimizer, lambda epoch: 1.0), "epoch"


def learning_rate(optimizer: Optimizer) -> float:
    """The first group's rate."""
    rate = optimizer.param_groups[0]["lr"]
    return float(rate.detach()) if isinstance(rate, torch.Tensor) else float(rate)
