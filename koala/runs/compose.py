"""From a command line to a checked configuration: Hydra composes, the schema types, and all that can be built without
data is built once, dry, so that what is wrong is said in one line before any work is done."""

import copy
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from torch import nn

from koala import models
from koala.errors import ConfigError
from koala.public import plain, secrets
from koala.runs import groups, schema
from koala.runs.command_line import typed_later
from koala.runs.groups import CONFIGS
from koala.runs.identity import at_work
from koala.runs.metrics import metric_keys
from koala.runs.schema import GROUPS
from koala.schema import valid
from koala.training.optimizers import build_optimizer, build_schedule, milestones, needs_of
from koala.training.parallel import mixes_samples
from koala.training.ranks import placed
from koala.training.tasks import conflict

# What a launcher tells a process of its place among the ranks, as koala.training.ranks.placed reads it.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
PRIMARY = "train"
HELP = """Train one network with one optimizer; asked again, resume it or print its record.

  python train.py optim=koala-m data=cifar100 num_gpus=2          (--optim koala-m --data cifar100 is the same)
  python train.py -m optim=koala-m,sgd,adam seed=1,2,3
  python train.py data=ptb data.path=DIR optim=adam optim.lr=1e-3

== Groups (choose with group=name; look inside with group=name --cfg job) ==
$APP_CONFIG_GROUPS
Keys below optim are the arguments of the optimizer's constructor, such as optim.nesterov=true.

== Keys (override with key=value) ==
{keys}

Run folder: <output_root>/<data>/<model>/<optim>/<hash of what matters>/seed<k>
Exit status: 0 finished, 2 bad input (nothing was written), 3 the loss diverged, 130/143 stopped (the last line says
at which checkpoint).
Shell completion: eval "$$(python train.py -sc install=bash)"
"""


def register() -> None:
    """Makes the keys and the help known to Hydra; call before hydra.main or compose."""
    # What configs/hydra/launcher/slurm.yaml asks of Slurm follows from the run's own keys.
    OmegaConf.register_new_resolver("gpus_per_node", _gpus_to_ask_for, replace=True)
    OmegaConf.register_new_resolver(
        "ranks_per_node", lambda num_gpus, cpu_procs: _gpus_to_ask_for(num_gpus) or cpu_procs, replace=True
    )
    store = ConfigStore.instance()
    store.store(name="schema", node=dict(schema.DEFAULTS))
    template = HELP.format(keys=schema.help_text())
    store.store(group="hydra/help", name="koala", node={"app_name": "train", "template": template})


def _gpus_to_ask_for(num_gpus) -> int | None:
    """GPUs of each node of a Slurm job; None for none, since a cluster without GPUs refuses to be asked for 0."""
    if not isinstance(num_gpus, int):
        raise ConfigError(
            f"num_gpus={num_gpus}: give a number for Slurm (0: CPU); the machine that submits cannot know how many "
            "GPUs the nodes have"
        )
    return num_gpus or None


def compose(overrides: Iterable[str]) -> DictConfig:
    """The checked configuration that `python train.py *overrides` would run.

    Raises:
        ConfigError: unknown key, group or option, wrong type, a value out of range, or parts that do not fit together.
    """
    return check(hydra_config(overrides))


def hydra_config(overrides: Iterable[str], **options: Any) -> DictConfig:
    """What Hydra makes of `overrides`, unchecked; `options` are those of `hydra.compose`.

    Raises:
        ConfigError: they are no overrides, or name what is not there.
    """
    given = typed_later(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(given)
        choices = tuple(one.input_line for one in parsed if one.key_or_group in GROUPS)
        values = [one for one in parsed if _sets_a_value(one)]
        if options or len(choices) + len(values) < len(parsed):
            return _from_files(given, **options)
        cfg = copy.deepcopy(_of_choices(choices))
        for one in values:
            OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True, force_add=one.is_force_add())
        return cfg
    except ConfigError:
        raise
    except Exception as error:  # of Hydra, its parser, OmegaConf: nothing of ours runs in there
        raise ConfigError(explain(error)) from error


def _sets_a_value(one: Override) -> bool:
    """Whether the override sets one key of a run to one value, and chooses no file."""
    kinds = (OverrideType.CHANGE, OverrideType.FORCE_ADD)
    plain = one.type in kinds and not one.is_sweep_override() and one.package is None and "/" not in one.key_or_group
    return plain and one.key_or_group not in GROUPS and not one.is_hydra_override()


@functools.cache
def _of_choices(choices: tuple[str, ...]) -> DictConfig:
    """The files that `choices` name, composed once: the runs of a table differ mostly in values, set afterwards."""
    return _from_files(list(choices))


def _from_files(overrides: list[str], **options: Any) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose(PRIMARY, overrides, **options)


def check_sweep(arguments: Sequence[str]) -> None:
    """Checks every run of a sweep (`-m` among the arguments of train.py) before the first of them is begun.

    Only where the command line says all of them: not where a sweeper chooses (optuna), or configurations lie elsewhere.

    Raises:
        ConfigError: of the first run that cannot be had as asked for; or there is one run, which no launcher gets.
    """
    given = [text for text in arguments if text not in ("-m", "--multirun")]
    elsewhere = any(text.startswith("-") or "hydra/sweeper" in text for text in given)
    if len(given) == len(arguments):
        for text in given if "hydra.mode=MULTIRUN" not in given else ():
            if re.match(r"\W*hydra[./](launcher|sweeper)", text):
                raise ConfigError(f"{text}: is for sweeps, and without -m this is one run, here; -m also takes one run")
        return
    if elsewhere:
        return
    try:
        asked = OverridesParser.create().parse_overrides(given)
        values = {one.get_key_element(): _choices(one) for one in asked if not one.is_hydra_override()}
    except HydraException:  # no overrides, or a sweep (glob, interval) that only Hydra or another sweeper can list
        return
    for chosen in itertools.product(*values.values()):
        run = [f"{key}={value}" for key, value in zip(values, chosen, strict=True)]
        check(hydra_config(run), typed=[*given, *run])


def _choices(override: Override) -> list[str]:
    """What a sweep gives to the key of `override`, one value a run; the same to all of them if it does not sweep."""
    sweeps = override.is_sweep_override()
    return list(override.sweep_string_iterator()) if sweeps else [override.get_value_element_as_str()]


def explain(error: BaseException) -> str:
    """One readable message from Hydra's or OmegaConf's nested ones, with the valid names when one is unknown."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    text = text.split(" Config search path")[0].split(" See https")[0]
    if missing := re.search(r"Could not find '([^']*)' Available options in '([^']*)': (.*)", text):
        path, group, names = missing.groups()
        option = path.removeprefix(f"{group}/")
        return f"{group}={option}: unknown; {valid(option, names.split())}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    reason = (str(cause).splitlines() or [""])[0]
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent):
        return f"unknown key {key}; {valid(key.rpartition('.')[2], parent)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{key}: {reason}" if key else reason
    given = getattr(error, "override", None)  # of a parse error, which does not say what was parsed
    return (f"{given}: " if given else "") + text


def bad_input(error: BaseException) -> int:
    """Prints what is wrong with the input, in one line, and returns the exit status for it."""
    text = str(error) if isinstance(error, ConfigError) else explain(error)
    print(plain(" ".join(text.split())), file=sys.stderr)
    return 2


def check(cfg: DictConfig, typed: Iterable[str] = ()) -> DictConfig:
    """`cfg` resolved, checked, and complete: every key that its schemas have, numbers as the type that they are.

    Args:
        typed: overrides that a person typed, who alone may ask for what lies outside of the configuration.

    Raises:
        ConfigError: naming key, value and what is valid.
    """
    _refuse_reading_outside(cfg, tuple(typed))
    _refuse_no_place()
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    _refuse_secrets(plain)
    for group in GROUPS:
        if not isinstance(plain.get(group), dict):
            raise ConfigError(f"{group}: none is chosen; valid: {', '.join(groups.options(group))}")
    if deleted := schema.DEFAULTS.keys() - plain.keys():
        raise ConfigError(f"{min(deleted)} was deleted; every run has one")
    run = groups.completed(schema.Run, plain, "")
    for group in GROUPS:
        run[group] = groups.complete(group, run[group])
    cfg = OmegaConf.create(run)
    if cfg.ranks == "auto":
        cfg.ranks = at_work(cfg)
    if cfg.schedule.name == "step":
        cfg.schedule.milestones = milestones(cfg.schedule, cfg.epochs)
    _fit_together(cfg)
    _build_dry(cfg)
    return cfg


def _refuse_reading_outside(cfg: DictConfig, typed: tuple[str, ...]) -> None:
    """Files and experiments may be somebody else's: ${oc.env:...} in them would read this person's secrets."""
    for key, value in _texts(OmegaConf.to_container(cfg, resolve=False)):
        for resolver in re.findall(r"\$\{\s*([\w.]+)\s*:", value):
            if not any(value in text for text in typed):
                raise ConfigError(
                    f"{key}={value}: ${{{resolver}:...}} reads from outside of the configuration; only an override "
                    "that is typed to train.py may do that"
                )


def _refuse_no_place() -> None:
    """A launcher's variable that is no number comes from a shell profile or a job script, which a person can mend."""
    try:
        placed()
    except (KeyError, ValueError):
        given = {name: value for name in LAUNCHER if (value := os.environ.get(name)) is not None}
        wrong = [f"{name}={value!r}" for name, value in given.items() if not value.strip().isdecimal()]
        raise ConfigError(
            f"environment: {', '.join(wrong or ['SLURM_LOCALID is missing'])}; a launcher sets whole numbers (unset "
            "them all to start by hand)"
        ) from None


def _refuse_secrets(plain: dict) -> None:
    for key, value in _texts(plain):
        for name, secret in secrets().items():
            if secret in value:
                raise ConfigError(
                    f"{key} holds the value of the environment variable {name}, which looks like a secret; it "
                    "would be written to records and W&B"
                )


def _texts(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Every string in nested containers, with the key that leads to it."""
    if isinstance(value, str):
        yield key, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _texts(child, f"{key}.{name}" if key else str(name))


def _fit_together(cfg: DictConfig) -> None:
    """What is wrong only in combination, as far as it can be known without the data.

    Raises:
        ConfigError: naming one of the keys, and what fits the other.
    """
    text = cfg.data.kind == "text"
    if text and cfg.accumulation > 1:
        raise ConfigError(f"accumulation={cfg.accumulation}: language models carry state from batch to batch; use 1")
    if cfg.batch_size < cfg.ranks * cfg.accumulation:
        raise ConfigError(
            f"batch_size={cfg.batch_size}: must be at least ranks x accumulation = {cfg.ranks * cfg.accumulation}"
        )
    if not (text or cfg.data.get("validation")):
        carve = "or carve one (data.validation=N)"
        if cfg.select == "best-val":
            raise ConfigError(f"select=best-val: data={cfg.data.name} has no validation split; valid: last, {carve}")
        if cfg.schedule.name == "plateau":
            raise ConfigError(
                f"schedule=plateau: data={cfg.data.name} has no validation split; valid: step, cosine, constant, "
                f"{carve}"
            )
    if cfg.schedule.name == "cosine" and cfg.schedule.warmup >= cfg.epochs:
        raise ConfigError(f"schedule.warmup={cfg.schedule.warmup:g}: must be below epochs={cfg.epochs}")
    known = metric_keys(cfg)
    for key, names in {"targets": cfg.targets or [], "objective": [cfg.objective]}.items():
        for name in names:
            if name not in known and (key, name) != ("objective", schema.DEFAULTS["objective"]):
                raise ConfigError(f"{key}={name}: the run has no such metric; {valid(name, known)}")
    # Such an optimizer has an average of its own, and is told by `eval` to put it in place of the weights: Lookahead
    # has no `eval` to pass on, and SWA would average the weights that are trained.
    if cfg.wrapper.name != "none" and callable(getattr(groups.optimizer_class(cfg.optim), "eval", None)):
        raise ConfigError(
            f"wrapper={cfg.wrapper.name}: optim={cfg.optim.name} averages the weights itself and is evaluated there; "
            "valid: wrapper=none"
        )
    if reason := conflict(cfg, max(cfg.ranks, at_work(cfg))):
        raise ConfigError(reason)
    # Of every matrix whole, without blocks, as the paper's tables ran it: the embedding's is vocabulary x vocabulary.
    if text and cfg.optim._target_ == "koala.baselines.shampoo.Shampoo":
        raise ConfigError(
            f"optim={cfg.optim.name}: takes a root of a matrix as wide as the vocabulary at every step (45 s of a CPU "
            f"core for 3,000 words), and data={cfg.data.name} is text; valid: data of images, or optim=soap "
            "optim.max_precondition_dim=512"
        )
    if cfg.num_nodes > 1 and cfg.num_gpus == "auto" and placed() is None:
        raise ConfigError(f"num_nodes={cfg.num_nodes}: say num_gpus=N, those of each node")


def _build_dry(cfg: DictConfig) -> None:
    """Builds model (without memory), optimizer (of a small one) and schedule, so that their own checks speak now.

    Raises:
        ConfigError: what they say.
    """
    side = cfg.data.get("resize") or cfg.data.get("size")
    shape = (cfg.data.bptt,) if cfg.data.kind == "text" else (cfg.data.channels, side, side)
    model = OmegaConf.to_container(cfg.model)
    network = _build_model(
        json.dumps(model | ({"pretrained": None} if "pretrained" in model else {})), cfg.data.kind, shape
    )
    if needs_of(cfg.optim).outputs and cfg.batch_size > 1 and mixes_samples(network):
        raise ConfigError(
            f"batch_size={cfg.batch_size}: optim={cfg.optim.name} observes each sample's outputs, which BatchNorm "
            "makes depend on the batch; valid: a model without BatchNorm such as model=mlp, or batch_size=1"
        )
    try:
        optimizer = build_optimizer(cfg.optim, cfg.wrapper, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    except ConfigError:
        raise
    except Exception as error:  # of any library's constructor
        fields = groups.constructor_keys(groups.optimizer_class(cfg.optim)).model_fields
        changed = [f"{key}={cfg.optim[key]}" for key in fields if cfg.optim[key] != fields[key].default]
        raise ConfigError(f"optim={cfg.optim.name}: {error} (given {', '.join(changed)})") from error
    build_schedule(cfg.schedule, optimizer, cfg.epochs, steps_per_epoch=100)


@functools.cache
def _build_model(model: str, kind: str, shape: tuple[int, ...]) -> nn.Module:
    with torch.device("meta"):
        return models.build(json.loads(model), kind=kind, num_classes=10, input_shape=shape)
