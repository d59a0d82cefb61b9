"""Optimizer and schedule from their configurations, and what optimizers ask of the loop."""

from dataclasses import dataclass

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from koala.errors import ConfigError

SUITE_KEYS = ("name", "_target_", "_partial_")  # of configs/optim/*.yaml; the others are the constructor's arguments


@dataclass(frozen=True)
class Needs:
    """What an optimizer's class asks of the loop beyond a gradient.

    Args:
        create_graph: it differentiates the gradient once more.
        contiguous: it views weights as flat, which the channels-last layout does not allow.
        global_loss: it decides by the closure's value, which therefore is the mean over all ranks.
        whole: it computes with whole tensors (norms, factors), so they cannot be sharded.
        module: it watches or sorts the network's layers, so its constructor takes the module instead of its weights.
        kind: the only kind of model that it takes.
        outputs: it observes outputs: its closure returns them with the targets, and calls no backward.
    """

    create_graph: bool = False
    contiguous: bool = False
    global_loss: bool = False
    whole: bool = False
    module: bool = False
    kind: str | None = None
    outputs: bool = False


# By top-level package and class. A class that is not here asks for nothing.
NEEDS = {
    "torch.LBFGS": Needs(contiguous=True, global_loss=True, whole=True),
    "pytorch_optimizer.AdamP": Needs(contiguous=True, whole=True),
    "pytorch_optimizer.Fromage": Needs(whole=True),
    "pytorch_optimizer.Prodigy": Needs(whole=True),
    "pytorch_optimizer.SOAP": Needs(whole=True),
    "pytorch_optimizer.SophiaH": Needs(create_graph=True),
    "koala.AdaFisher": Needs(module=True, whole=True),
    "koala.AdaFisherW": Needs(module=True, whole=True),
    "koala.ALIG": Needs(global_loss=True, whole=True),
    "koala.AdaHessian": Needs(create_graph=True),
    "koala.DiagonalEKF": Needs(kind="vision", outputs=True),  # of text, each word of the vocabulary were an output
    "koala.KFAC": Needs(module=True, whole=True, kind="vision"),
    "koala.LayerwiseEKF": Needs(kind="vision", outputs=True),
    "koala.MoMo": Needs(global_loss=True, whole=True),
    "koala.MoMoAdam": Needs(global_loss=True, whole=True),
    "koala.Muon": Needs(module=True, whole=True),
    "koala.Shampoo": Needs(whole=True),
}


def needs_of(optim: DictConfig) -> Needs:
    """What the configured optimizer's class asks of the loop."""
    kind = get_class(optim._target_)
    return NEEDS.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}", Needs())


def conflict(cfg: DictConfig, world: int) -> str | None:
    """Why this run's optimizer cannot be had as configured, on `world` ranks, and what can; None if it can."""
    needs, name = needs_of(cfg.optim), f"optim={cfg.optim.name}"
    if needs.kind and cfg.model.kind != needs.kind:
        return f"{name}: takes {needs.kind} models only, and model={cfg.model.name} is not"
    if needs.outputs and (reason := _outputs_conflict(cfg, world)):
        return f"{name}: {reason}"
    sharded = cfg.strategy == "fsdp" and world > 1
    if needs.create_graph and world > 1:
        return f"{name}: differentiates the gradient, which cannot be reduced over {world} ranks before; use one rank"
    if needs.create_graph and cfg.compile:
        return f"compile=true: {name} differentiates the gradient, which a compiled model's cannot; use compile=false"
    if needs.module and cfg.compile:
        return f"compile=true: {name} works on the modules themselves; use compile=false"
    if needs.whole and sharded:
        return f"strategy=fsdp: {name} computes with whole tensors; use strategy=ddp"
    if cfg.wrapper.name != "none" and sharded:
        return f"wrapper={cfg.wrapper.name} averages whole weights: use strategy=ddp"
    return None


def _outputs_conflict(cfg: DictConfig, world: int) -> str | None:
    """What an optimizer that differentiates the outputs itself leaves no room for."""
    if world > 1:
        return f"a batch is one measurement, and ranks={world} share it; valid: one rank"
    if cfg.accumulation > 1:
        return f"a batch is one measurement; valid: accumulation=1, not {cfg.accumulation}"
    if cfg.grad_clip is not None:
        return f"there is no gradient of a loss to clip; valid: grad_clip=null, not {cfg.grad_clip:g}"
    if cfg.compile:
        return "a compiled backward pass makes one product, not many; valid: compile=false"
    if cfg.schedule.name != "constant":
        return f"has no learning rate; valid: schedule=constant, not {cfg.schedule.name}"
    if cfg.wrapper.name == "lookahead":
        return "its covariance is that of its weights; valid: wrapper=none or swa, not lookahead"
    if cfg.optim.likelihood != "categorical":
        return f"images have classes; valid: optim.likelihood=categorical, not {cfg.optim.likelihood}"
    return None


def constructor_arguments(optim: DictConfig) -> dict:
    """Keyword arguments of the optimizer's constructor."""
    arguments = OmegaConf.to_container(optim, resolve=True)
    arguments = {key: value for key, value in arguments.items() if key not in SUITE_KEYS}
    # Optimizers check tuples such as betas by type or unpack them; YAML has only lists.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def build_optimizer(optim: DictConfig, wrapper: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `model`'s trainable parameters, inside Lookahead if asked for."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    subject = model if needs_of(optim).module else parameters
    optimizer = get_class(optim._target_)(subject, **constructor_arguments(optim))
    if wrapper.name == "lookahead":
        from pytorch_optimizer import Lookahead

        return Lookahead(optimizer, k=wrapper.k, alpha=wrapper.alpha)
    return optimizer


def filter_of(optimizer: Optimizer) -> Optimizer | None:
    """The Kalman filter that `optimizer` is or wraps, None for any other: it measures losses and can be watched."""
    base = getattr(optimizer, "optimizer", optimizer)  # inside Lookahead
    return base if hasattr(base, "diagnostics") else None


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
    if "lr" not in optimizer.param_groups[0]:
        return NoSchedule(), "epoch"
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
        total, warmup = round((schedule.length or epochs) * unit), round(schedule.warmup * unit)
        rates = [group["lr"] for group in optimizer.param_groups]
        floor = schedule.final * float(rates[0])
        cosine = schedulers.CosineAnnealingLR(optimizer, max(1, total - warmup), eta_min=floor)
        if warmup == 0:
            return cosine, schedule.by
        rise = schedulers.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
        return schedulers.SequentialLR(optimizer, [rise, cosine], milestones=[warmup]), schedule.by
    return schedulers.LambdaLR(optimizer, lambda epoch: 1.0), "epoch"


class NoSchedule:
    """Of an optimizer without a learning rate."""

    def step(self) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to load."""


def learning_rate(optimizer: Optimizer) -> dict[str, float]:
    """{"lr": the first group's rate}, without entry where there is none."""
    if "lr" not in optimizer.param_groups[0]:
        return {}
    return {"lr": float(optimizer.param_groups[0]["lr"])}
