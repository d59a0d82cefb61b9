"""From overrides to a checked configuration: Hydra composes, the schema types, and all that can be built without
data is built once, dry, so that what is wrong becomes one line before any work is done."""

import functools
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from koala import models
from koala.errors import ConfigError
from koala.public import secrets
from koala.runs import groups, schema
from koala.runs.composing import config_error, hydra_config
from koala.runs.identity import ranks_now
from koala.runs.metrics import metric_keys
from koala.runs.schema import GROUPS
from koala.training.optimizers import build_optimizer, build_schedule, filter_of, milestones, needs_of
from koala.training.ranks import launched_rank
from koala.training.tasks import check_fit

# What a launcher tells a process of its rank, as koala.training.ranks.launched_rank reads it.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")


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
    _refuse_reading_outside(cfg, tuple(typed))
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise config_error(error) from error
    _refuse_secrets(plain)
    for group in GROUPS:
        if not isinstance(plain.get(group), dict):
            raise ConfigError(group, "null", "none is chosen", valid=groups.options(group))
    if deleted := schema.DEFAULTS.keys() - plain.keys():
        raise ConfigError(min(deleted), None, "was deleted; every run has one")
    run = groups.completed(schema.Run, plain, "")
    for group in GROUPS:
        run[group] = groups.complete(group, run[group])
    try:
        cfg = OmegaConf.create(run)
    except OmegaConfBaseException as error:  # a constructor's default that a configuration cannot hold
        raise config_error(error) from error
    here = _ranks_here(cfg)
    if cfg.ranks == "auto":
        cfg.ranks = here
    if cfg.schedule.name == "step":
        cfg.schedule.milestones = milestones(cfg.schedule, cfg.epochs)
    _fit_together(cfg, max(cfg.ranks, here))
    return cfg


def _refuse_reading_outside(cfg: DictConfig, typed: tuple[str, ...]) -> None:
    """Files and experiments may be somebody else's: ${oc.env:...} in them would read this person's secrets."""
    for key, value in _texts(OmegaConf.to_container(cfg, resolve=False)):
        for resolver in re.findall(r"\$\{\s*([\w.]+)\s*:", value):
            if not any(value in text for text in typed):
                reason = f"${{{resolver}:...}} reads from outside of the configuration"
                raise ConfigError(key, value, reason, valid="such a value only where it is typed to train.py")


def _ranks_here(cfg: DictConfig) -> int:
    """Ranks that would work on the run now. A launcher's variable that is no number comes from a shell profile or a
    job script, which a person can mend."""
    try:
        launched = launched_rank()
    except (KeyError, ValueError):
        given = {name: value for name in LAUNCHER if (value := os.environ.get(name)) is not None}
        wrong = {name: value for name, value in given.items() if not value.strip().isdecimal()}
        name = next(iter(wrong), "SLURM_LOCALID")
        valid = "whole numbers, as a launcher sets them all (unset them all to start by hand)"
        raise ConfigError(name, wrong.get(name), "is not what a launcher sets", valid=valid) from None
    if cfg.num_nodes > 1 and cfg.num_gpus == "auto" and launched is None:
        raise ConfigError("num_gpus", "auto", "one node cannot know the others' GPUs", valid="those of each node")
    return ranks_now(cfg, launched)


def _refuse_secrets(plain: dict) -> None:
    hidden = secrets()
    for key, value in _texts(plain):
        for name, secret in hidden.items():
            if secret in value:
                reason = f"holds the value of the environment variable {name}, which looks like a secret"
                raise ConfigError(key, None, f"{reason}; it would be written to records and W&B")


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
    if not (text or cfg.data.get("validation")):
        reason, carve = f"data={cfg.data.name} has no validation split", "or carve one with data.validation=N"
        if cfg.select == "best-val":
            raise ConfigError("select", "best-val", reason, valid=f"last, {carve}")
        if cfg.schedule.name == "plateau":
            raise ConfigError("schedule", "plateau", reason, valid=f"step, cosine, constant, {carve}")
    if cfg.schedule.name == "cosine" and cfg.schedule.warmup >= cfg.epochs:
        raise ConfigError("schedule.warmup", cfg.schedule.warmup, f"must be below epochs={cfg.epochs}")
    columns = metric_keys(cfg)
    for key, names in {"targets": cfg.targets or [], "objective": [cfg.objective]}.items():
        for name in names:
            if name not in columns and (key, name) != ("objective", schema.DEFAULTS["objective"]):
                raise ConfigError(key, name, "the run has no such metric", valid=columns)
    # Such an optimizer has an average of its own, and puts it in place of the weights at `eval`: Lookahead has no
    # `eval` to pass on, and SWA would average the weights that are trained.
    if cfg.wrapper.name != "none" and callable(getattr(groups.optimizer_class(cfg.optim), "eval", None)):
        reason = f"optim={cfg.optim.name} averages the weights itself and is evaluated there"
        raise ConfigError("wrapper", cfg.wrapper.name, reason, valid="wrapper=none")
    check_fit(cfg, world)


def build_dry(cfg: DictConfig) -> None:
    """Builds model (without memory), optimizer (of a small one, with a step) and schedule: their own checks speak now.

    Raises:
        ConfigError: what they report.
    """
    side = cfg.data.get("resize") or cfg.data.get("size")
    shape = (cfg.data.bptt,) if cfg.data.kind == "text" else (cfg.data.channels, side, side)
    model = OmegaConf.to_container(cfg.model)
    network = _build_model(
        json.dumps(model | ({"pretrained": None} if "pretrained" in model else {})), cfg.data.kind, shape
    )
    if needs_of(cfg.optim).outputs and cfg.batch_size > 1 and _mixes_samples(network):
        reason = f"optim={cfg.optim.name} observes each sample's outputs, which BatchNorm makes depend on the batch"
        raise ConfigError("batch_size", cfg.batch_size, reason, valid="1, or a model without BatchNorm such as mlp")
    try:
        optimizer = build_optimizer(cfg.optim, cfg.wrapper, _small_network())
        if cfg.num_gpus == 0 or not torch.cuda.is_available():
            _step_dry(cfg.optim, cfg.wrapper)
    except ConfigError:
        raise
    except Exception as error:  # of any library's constructor or step
        fields = groups.constructor_keys(groups.optimizer_class(cfg.optim)).model_fields
        changed = [f"{key}={cfg.optim[key]}" for key in fields if cfg.optim.get(key) != fields[key].default]
        given = f" (given {', '.join(changed)})" if changed else ""
        raise ConfigError("optim", cfg.optim.name, f"{error}{given}") from error
    try:
        build_schedule(cfg.schedule, optimizer, cfg.epochs, steps_per_epoch=100)
    except ConfigError:
        raise
    except Exception as error:  # of torch's schedulers
        raise ConfigError("schedule", cfg.schedule.name, f"{error}") from error


def _small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def _step_dry(optim: DictConfig, wrapper: DictConfig) -> None:
    """Steps an optimizer that is neither ours nor torch's: some take no biases, or need a group of processes."""
    net = _small_network()
    optimizer = build_optimizer(optim, wrapper, net)
    if optim._target_.startswith(("koala.", "torch.")) or filter_of(optimizer) is not None:
        return

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 2)).square().sum()
        loss.backward(create_graph=needs_of(optim).create_graph)
        return loss

    if callable(getattr(optimizer, "train", None)):  # a schedule-free one, which evaluates elsewhere
        optimizer.train()
    with torch.random.fork_rng(devices=[]):
        optimizer.step(closure)


@functools.cache
def _build_model(model: str, kind: str, shape: tuple[int, ...]) -> nn.Module:
    with torch.device("meta"):
        return models.build(json.loads(model), kind=kind, num_classes=10, input_shape=shape)


def _mixes_samples(module: nn.Module) -> bool:
    """Whether the outputs of one sample depend on the others in training: it has a BatchNorm that is trained."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in module.train().modules())
