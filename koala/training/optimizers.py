"""Optimizer and schedule from their configurations, and what optimizers need from the loop."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from koala.errors import ConfigError, first_line, shown

SUITE_KEYS = ("name", "_target_")  # of configs/optim/*.yaml; the others are the constructor's arguments


@dataclass(frozen=True)
class Needs:
    """What an optimizer's class needs from the loop beyond a gradient.

    Args:
        create_graph: it differentiates the gradient once more.
        contiguous: it views weights as flat, which the channels-last layout does not allow.
        global_loss: it decides by the closure's value, which therefore is the mean over all ranks.
        unsharded: it computes with entire tensors (norms, factors), so they cannot be sharded.
        module: it watches or sorts the network's layers, so its constructor takes the module instead of its weights.
        kinds: the only kinds of model that it takes; none: all.
        reason: why it takes no others.
        outputs: it observes outputs: its closure returns them with the targets, and calls no backward.
    """

    create_graph: bool = False
    contiguous: bool = False
    global_loss: bool = False
    unsharded: bool = False
    module: bool = False
    kinds: tuple[str, ...] = ()
    reason: str = ""
    outputs: bool = False


OBSERVES_OUTPUTS = Needs(
    outputs=True,
    kinds=("vision", "text-classification"),
    reason="of a language model, each word of the vocabulary is an output",
)
# By top-level package and class. A class that is not here needs nothing.
NEEDS = {
    "torch.LBFGS": Needs(contiguous=True, global_loss=True, unsharded=True),
    "pytorch_optimizer.AdaHessian": Needs(create_graph=True),
    "pytorch_optimizer.AdamP": Needs(contiguous=True, unsharded=True),
    "pytorch_optimizer.Fromage": Needs(unsharded=True),
    "pytorch_optimizer.Prodigy": Needs(unsharded=True),
    "pytorch_optimizer.SOAP": Needs(unsharded=True),
    "pytorch_optimizer.SophiaH": Needs(create_graph=True),
    "koala.AdaFisher": Needs(module=True, unsharded=True),
    "koala.AdaFisherW": Needs(module=True, unsharded=True),
    "koala.ALIG": Needs(global_loss=True, unsharded=True),
    "koala.AdaHessian": Needs(create_graph=True),
    "koala.DiagonalEKF": OBSERVES_OUTPUTS,
    "koala.KFAC": Needs(
        module=True, unsharded=True, kinds=("vision",), reason="it watches convolutions and linear layers"
    ),
    "koala.LayerwiseEKF": OBSERVES_OUTPUTS,
    "koala.MetricKOALA": Needs(unsharded=True),
    "koala.MoMo": Needs(global_loss=True, unsharded=True),
    "koala.MoMoAdam": Needs(global_loss=True, unsharded=True),
    "koala.Muon": Needs(module=True, unsharded=True),
    # Of every matrix whole, without blocks, as the paper's tables ran it: an embedding's is vocabulary x vocabulary.
    "koala.Shampoo": Needs(
        unsharded=True,
        kinds=("vision", "gan"),
        reason="it takes a root of a matrix as wide as the vocabulary at every step (45 s of a CPU core for 3,000 "
        "words); optim=soap optim.max_precondition_dim=512 does not",
    ),
}


OUTPUTS = {
    "ranks": (1,), "accumulation": (1,), "compile": (False,), "wrapper": ("none", "swa"), "grad_clip": (None,),
    "schedule": ("constant",), "optim.likelihood": ("categorical",),
}  # fmt: skip


def optimizer_class(optim: Mapping[str, Any]) -> type[Optimizer]:
    """The class that `optim._target_` names.

    Raises:
        ConfigError: there is none, or it is no torch optimizer.
    """
    target = optim.get("_target_")
    if not isinstance(target, str):
        valid = "a torch.optim.Optimizer, such as koala.SOFIM"
        raise ConfigError("optim._target_", "null" if target is None else target, "names no class", valid=valid)
    try:
        kind = pkgutil.resolve_name(target)
    except Exception as error:  # whatever importing somebody's module raises
        raise ConfigError("optim._target_", target, f"cannot be imported ({first_line(error)})") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError("optim._target_", target, "is no torch.optim.Optimizer")
    return kind


def needs_of(optim: DictConfig) -> Needs:
    """What the configured optimizer's class needs from the loop."""
    kind = optimizer_class(optim)
    return NEEDS.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}", Needs())


def allow_only(allowed: dict[str, tuple], cfg: DictConfig, world: int, reason: str) -> None:
    """Raises ConfigError unless `cfg` has the `allowed` values of keys that else may have any; `reason` says why."""
    given = {"ranks": world, "wrapper": cfg.wrapper.name, "schedule": cfg.schedule.name}
    for key, values in allowed.items():
        value = given.get(key, OmegaConf.select(cfg, key))
        if value not in values:
            alone = " (num_gpus=1, or num_gpus=0 cpu_procs=1)" if key == "ranks" else ""
            valid = " | ".join(map(shown, values)) + alone
            raise ConfigError(key, "null" if value is None else value, reason, valid=valid)


def check_needs(cfg: DictConfig, world: int) -> None:
    """Raises ConfigError, with what is valid, unless this run's optimizer can be had as configured on `world` ranks."""
    needs, name, sharded = needs_of(cfg.optim), f"optim={cfg.optim.name}", cfg.strategy == "fsdp" and world > 1
    if needs.kinds and cfg.model.kind not in needs.kinds:
        reason = f"model={cfg.model.name} is a {cfg.model.kind} model, and {needs.reason}"
        raise ConfigError("optim", cfg.optim.name, reason, valid=f"models of kind {', '.join(needs.kinds)}")
    if needs.outputs:
        reason = f"{name} measures the outputs of a batch, without learning rate or gradient"
        allow_only(OUTPUTS, cfg, world, reason)
    if needs.create_graph and world > 1:
        raise ConfigError("ranks", world, f"{name} differentiates the gradient before ranks can reduce it", valid="1")
    if needs.create_graph and cfg.compile:
        raise ConfigError(
            "compile", True, f"{name} differentiates the gradient, which a compiled model's cannot be", valid="false"
        )
    if needs.module and cfg.compile:
        raise ConfigError("compile", True, f"{name} works on the modules themselves", valid="false")
    if needs.unsharded and sharded:
        raise ConfigError("strategy", "fsdp", f"{name} computes with entire tensors", valid="strategy=ddp")
    if cfg.wrapper.name != "none" and sharded:
        raise ConfigError(
            "strategy", "fsdp", f"wrapper={cfg.wrapper.name} averages entire weights", valid="strategy=ddp"
        )


def build_optimizer(optim: DictConfig, wrapper: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `model`'s trainable parameters, inside Lookahead if configured."""
    arguments = {
        # Optimizers check tuples such as betas by type or unpack them; YAML has only lists.
        key: tuple(value) if isinstance(value, list) else value
        for key, value in OmegaConf.to_container(optim, resolve=True).items()
        if key not in SUITE_KEYS
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(optim)(model if needs_of(optim).module else parameters, **arguments)
    if wrapper.name == "lookahead":
        from pytorch_optimizer import Lookahead

        return Lookahead(optimizer, k=wrapper.k, alpha=wrapper.alpha)
    return optimizer


def filter_of(optimizer: Optimizer) -> Optimizer | None:
    """The Kalman filter that `optimizer` is or wraps, None for any other: it measures losses and has diagnostics."""
    base = getattr(optimizer, "optimizer", optimizer)  # inside Lookahead
    return base if hasattr(base, "diagnostics") else None


def milestones(schedule: DictConfig, epochs: int) -> list[int]:
    """Milestones in epochs for a run of `epochs`: the tabulated ones, or those of the nearest length, scaled."""
    table = schedule.milestones
    if OmegaConf.is_list(table) or isinstance(table, (list, tuple)):
        return [int(epoch) for epoch in table]
    table = {int(length): list(values) for length, values in table.items()}
    if not table:
        raise ConfigError("schedule.milestones", "{}", "is empty", valid="epochs, such as [30,60,90]")
    length = min(table, key=lambda length: (abs(length - epochs), length))
    return [round(milestone * epochs / length) for milestone in table[length]]


def build_schedule(schedule: DictConfig, optimizer: Optimizer, epochs: int, steps_per_epoch: int):
    """A torch scheduler and whether it steps per epoch ("epoch"), per step ("step") or on validation ("plateau").

    Raises:
        ConfigError: a schedule of the learning rate, and an optimizer without one.
    """
    if schedule.name == "constant":
        return NoSchedule(), "epoch"
    if "lr" not in optimizer.param_groups[0]:
        raise ConfigError("schedule", schedule.name, "the optimizer has no learning rate", valid="constant")
    if schedule.name == "step":
        return schedulers.MultiStepLR(optimizer, milestones(schedule, epochs), schedule.gamma), "epoch"
    if schedule.name == "plateau":
        return schedulers.ReduceLROnPlateau(
            optimizer, factor=schedule.gamma, patience=schedule.patience, threshold=0.0
        ), "plateau"
    unit = 1 if schedule.by == "epoch" else steps_per_epoch
    total, warmup = round((schedule.length or epochs) * unit), round(schedule.warmup * unit)
    floor = schedule.final * float(optimizer.param_groups[0]["lr"])
    cosine = schedulers.CosineAnnealingLR(optimizer, max(1, total - warmup), eta_min=floor)
    if warmup == 0:
        return cosine, schedule.by
    rise = schedulers.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    return schedulers.SequentialLR(optimizer, [rise, cosine], milestones=[warmup]), schedule.by


class NoSchedule:
    """A constant learning rate, or none."""

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
