"""From overrides to a checked configuration: Hydra composes, the schema types, and all that can be built without
data is built once, dry, so that what is wrong becomes one line before any work is done."""

import contextlib
import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from koala import models, schema
from koala.data.spec import spec_of
from koala.errors import ConfigError, first_line
from koala.public import secrets
from koala.run_keys import DEFAULTS, GROUPS, Run
from koala.runs.overrides import config_error, hydra_config
from koala.runs.schema import options, schema_of
from koala.training import optimizers
from koala.training.optimizers import build_optimizer, needs_of, optimizer_class
from koala.training.ranks import ranks_now
from koala.training.tasks import build_task, metric_keys


def compose(overrides: Iterable[str]) -> DictConfig:
    """The checked configuration that `python train.py *overrides` would run.

    Raises:
        ConfigError: unknown key, group or option, wrong type, a value out of range, or parts that do not fit together.
    """
    cfg = check(hydra_config(overrides))
    build_dry(cfg)
    return cfg


def check(cfg: DictConfig, typed: Iterable[str] = ()) -> DictConfig:
    """`cfg` resolved, checked, and complete: every key that its schemas have, numbers as the type that they are.

    Libraries of networks are not imported for it: what only building can tell is left to `build_dry`.

    Args:
        typed: overrides that a person typed, who alone may read what lies outside of the configuration.

    Raises:
        ConfigError: naming key, value and what is valid.
    """
    plain = _resolved(cfg, tuple(typed))
    for group in GROUPS:
        if not isinstance(plain.get(group), dict):
            raise ConfigError(group, "null", "none is chosen", valid=options(group))
    if deleted := DEFAULTS.keys() - plain.keys():
        raise ConfigError(min(deleted), None, "was deleted; every run has one")
    run = schema.check(Run, plain, "").model_dump()
    for group in GROUPS:
        suite = {key: run[group].pop(key) for key in ("_target_",) if group == "optim" and key in run[group]}
        run[group] = suite | schema.check(schema_of(group, plain[group]), run[group], f"{group}.").model_dump()
    try:
        cfg = OmegaConf.create(run)
    except OmegaConfBaseException as error:  # a constructor's default that a configuration cannot hold
        raise config_error(error) from error
    here = ranks_now(cfg)
    if cfg.ranks == "auto":
        cfg.ranks = here
    if cfg.schedule.name == "step":
        cfg.schedule.milestones = optimizers.milestones(cfg.schedule, cfg.epochs)
    _fit_together(cfg, max(cfg.ranks, here))
    return cfg


def _resolved(cfg: DictConfig, typed: tuple[str, ...]) -> dict[str, Any]:
    """`cfg` in plain values. Files and experiments may be somebody else's: ${oc.env:...} in them would read this
    person's secrets, and no secret is to be written to records and W&B."""
    for key, value in _texts(OmegaConf.to_container(cfg, resolve=False)):
        for resolver in re.findall(r"\$\{\s*([\w.]+)\s*:", value):
            if not any(value in text for text in typed):
                reason = f"${{{resolver}:...}} reads from outside of the configuration"
                raise ConfigError(key, value, reason, valid="such a value on train.py's command line only")
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    hidden = secrets()
    for key, value in _texts(plain):
        if "${" in value:  # put together from parts, or escaped; it would be resolved once more, past the check above
            raise ConfigError(key, value, "is an interpolation where a value should be", valid="text without ${")
        for name in (name for name, secret in hidden.items() if secret in value):
            reason = f"holds the value of the environment variable {name}, which looks like a secret"
            raise ConfigError(key, None, f"{reason}; it would be written to records and W&B")
    return plain


def _texts(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Every string in nested containers, with the key that leads to it."""
    if isinstance(value, str):
        yield key, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _texts(child, f"{key}.{name}" if key else str(name))


def _fit_together(cfg: DictConfig, world: int) -> None:
    """What is wrong only in combination, as far as that needs no data.

    Raises:
        ConfigError: naming one of the keys, and what fits the other.
    """
    text = cfg.data.kind == "text"
    if text and cfg.accumulation > 1:
        reason = "language models carry state from batch to batch"
        raise ConfigError("accumulation", cfg.accumulation, reason, valid="1")
    least = cfg.ranks * cfg.accumulation
    if cfg.batch_size < least:
        raise ConfigError("batch_size", cfg.batch_size, f"ranks x accumulation = {least}", valid=f"{least} or more")
    columns = metric_keys(cfg)
    if "val_loss" not in columns:
        reason = "the run measures no val_loss"
        carve = "" if cfg.data.get("validation") else ", or carve a validation split with data.validation=N"
        if cfg.select == "best-val":
            raise ConfigError("select", "best-val", reason, valid=f"last{carve}")
        if cfg.schedule.name == "plateau":
            raise ConfigError("schedule", "plateau", reason, valid=f"step, cosine, constant{carve}")
    if cfg.schedule.name == "cosine" and cfg.schedule.warmup >= cfg.epochs:
        raise ConfigError("schedule.warmup", cfg.schedule.warmup, f"must be below epochs={cfg.epochs}")
    for key, names in {"targets": cfg.targets or [], "objective": [cfg.objective]}.items():
        for name in names:
            if name not in columns and (key, name) != ("objective", DEFAULTS["objective"]):
                raise ConfigError(key, name, "the run has no such metric", valid=columns)
    # Such an optimizer has an average of its own, and puts it in place of the weights at `eval`: Lookahead has no
    # `eval` to pass on, and SWA would average the weights that are trained.
    if cfg.wrapper.name != "none" and callable(getattr(optimizer_class(cfg.optim), "eval", None)):
        reason = f"optim={cfg.optim.name} averages the weights itself and is evaluated there"
        raise ConfigError("wrapper", cfg.wrapper.name, reason, valid="wrapper=none")
    build_task(cfg).check(cfg, world)


def build_dry(cfg: DictConfig) -> None:
    """Builds model (without memory), optimizer (of a small one, with a step) and schedule: their own checks speak now.

    Raises:
        ConfigError: what they report.
    """
    shape = spec_of(cfg.data).input_shape
    mixes_samples = _build_model(json.dumps(models.untrained(cfg.model)), cfg.data.kind, shape)
    if needs_of(cfg.optim).outputs and cfg.batch_size > 1 and mixes_samples:
        reason = f"optim={cfg.optim.name} observes each sample's outputs, which BatchNorm makes depend on the batch"
        raise ConfigError("batch_size", cfg.batch_size, reason, valid="1, or a model without BatchNorm such as mlp")
    try:
        optimizer = _stepped(cfg)
    except ConfigError:
        raise
    except Exception as error:  # of any library's constructor or step
        raise _unfit(cfg, error) from error
    try:
        optimizers.build_schedule(cfg.schedule, optimizer, cfg.epochs, steps_per_epoch=100)
    except ConfigError:
        raise
    except Exception as error:  # of torch's schedulers
        raise ConfigError("schedule", cfg.schedule.name, str(error)) from error


def _unfit(cfg: DictConfig, error: Exception) -> ConfigError:
    """The refusal of an optimizer whose constructor or first step failed: what it was given, and what may be wrong."""
    optim, fields = cfg.optim, schema_of("optim", cfg.optim).model_fields
    arguments = {key: field.default for key, field in fields.items() if key != "name"}
    changed = [f"{key}={optim[key]}" for key, default in arguments.items() if optim.get(key) != default]
    given = f" (given {', '.join(changed)})" if changed else ""
    reason = f"{optim._target_} says: {first_line(error)}{given}"
    with contextlib.suppress(Exception):
        _stepped(cfg, bias=False)
        reason = f"takes no weights of one dimension, such as biases ({reason})"
    valid = "other values of its arguments, or another class: it is given all weights as one list"
    if "muon" in optim._target_.lower():
        valid = f"optim=muon, which gives all other parameters to AdamW; {valid}"
    return ConfigError("optim", optim.name, reason, valid=valid)


@functools.cache
def _build_model(model: str, kind: str, shape: tuple[int, ...]) -> bool:
    """Builds a model; whether its outputs for one sample depend on the others in training (a BatchNorm is trained)."""
    with torch.device("meta"):
        module = models.build(json.loads(model), kind=kind, num_classes=10, input_shape=shape).train()
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in module.modules())


def _stepped(cfg: DictConfig, bias: bool = True) -> torch.optim.Optimizer:
    """The optimizer of a small network; one that is not ours has stepped: some take no biases, no dense gradients, or
    need a group of processes."""
    network = nn.Sequential(nn.Linear(2, 2, bias), nn.Linear(2, 2, bias))
    optimizer = build_optimizer(cfg.optim, cfg.wrapper, network)
    ours = cfg.optim._target_.startswith("koala.") or optimizers.filter_of(optimizer) is not None
    if ours or (cfg.num_gpus != 0 and torch.cuda.is_available()):
        return optimizer

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = network(torch.ones(2, 2)).square().sum()
        loss.backward(create_graph=needs_of(cfg.optim).create_graph)
        return loss

    if callable(getattr(optimizer, "train", None)):  # a schedule-free one, which evaluates elsewhere
        optimizer.train()
    with torch.random.fork_rng(devices=[]):
        optimizer.step(closure)
    return optimizer
