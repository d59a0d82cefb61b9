"""The configuration of one run: its schema, how Hydra composes it, and the checks made before any work starts."""

import difflib
import hashlib
import inspect
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from koala.errors import ConfigError
from koala.training.optimizers import conflict, constructor_arguments, needs_of
from koala.training.ranks import gpus_per_node, placed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRIMARY = "train"
GROUPS = ("data", "model", "optim", "schedule", "wrapper", "logger")
PRECISIONS = ("fp32", "tf32", "bf16", "fp64")
STRATEGIES = ("ddp", "fsdp")


def _key(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every top-level key of a run; `python train.py --help` prints this list."""

    data: Any = _key(MISSING, "data set (group)")
    model: Any = _key(MISSING, "model (group; the default depends on data)")
    optim: Any = _key(MISSING, "optimizer (group)")
    schedule: Any = _key(MISSING, "learning-rate schedule (group; the default depends on data)")
    wrapper: Any = _key(MISSING, "around the optimizer (group)")
    logger: Any = _key(MISSING, "mirror of the records (group)")

    seed: int = _key(1, "weights, order of the samples, augmentation, dropout")
    epochs: int = _key("${data.epochs}", "passes over the training set")
    max_steps: int | None = _key(None, "stop after so many optimizer steps, whatever the epochs say")
    batch_size: int = _key("${data.batch_size}", "global: over all ranks and accumulation steps")
    accumulation: int = _key(1, "split each rank's batch in so many forward-backward passes")
    eval_batch_size: int = _key("${data.eval_batch_size}", "evaluation's own, per rank; does not change the metrics")
    grad_clip: float | None = _key("${data.grad_clip}", "largest global gradient norm, applied before the step")
    select: str = _key("${data.select}", "model that is reported: last | best-val (then tested once)")
    targets: Any = _key(None, "{metric: value}; the epoch, step and seconds of first reaching each are recorded")

    num_gpus: Any = _key("auto", "GPUs on each node: auto (all) | 0 (CPU) | n")
    num_nodes: int = _key(1, "machines; above 1 start with torchrun, srun or a Slurm launcher")
    cpu_procs: int = _key(1, "ranks when num_gpus=0")
    strategy: str = _key("ddp", "how ranks share the model: ddp | fsdp")
    precision: str = _key("fp32", "fp32 | tf32 (GPUs) | bf16 (autocast) | fp64 (for exact comparisons)")
    sync_bn: bool = _key(False, "BatchNorm normalises over the samples of all ranks")
    compile: bool = _key(False, "torch.compile the model")
    channels_last: bool = _key(True, "memory layout of image models")
    deterministic: bool = _key(False, "torch's deterministic algorithms only")

    output_root: str = _key("outputs", "run folders go here")
    data_root: str = _key("data", "caches of decoded data sets go here")
    eval_every: int = _key(1, "epochs between evaluations")
    checkpoint_every: float = _key(60.0, "seconds of training between checkpoints; 0: at every step")
    checkpoint_async: Any = _key("auto", "write checkpoints beside training: auto (on GPUs) | true | false")
    log_every: int = _key(20, "steps between looks at the loss (each look waits for the device)")
    timeout: float = _key(1800.0, "seconds after which ranks that wait for a hung one give up")
    max_restarts: int = _key(0, "times that workers are started again, from the checkpoint, after one died")
    resume: bool = _key(True, "go on from the last checkpoint; false: refuse if there is one")
    rerun: bool = _key(False, "move a finished or unfinished run aside and start again")


# What can be changed between a run and its resumption without making it another run: where it writes, how it is
# watched, and how the same arithmetic is spread over devices.
IMMATERIAL = {
    "seed",
    "logger",
    "targets",
    "eval_batch_size",
    "num_gpus",
    "num_nodes",
    "cpu_procs",
    "strategy",
    "compile",
    "channels_last",
    "deterministic",
    "output_root",
    "data_root",
    "checkpoint_every",
    "checkpoint_async",
    "log_every",
    "timeout",
    "max_restarts",
    "resume",
    "rerun",
}
IMMATERIAL_DATA = {"path", "hub", "workers"}


def help_text() -> str:
    """Body of `--help`: every top-level key with its default, from the schema itself."""
    lines = []
    for item in fields(Config):
        if item.name not in GROUPS:
            # Hydra fills ${...} in its help text, so interpolations are shown by the key they follow.
            shown = str(item.default).replace("${", "= ").replace("}", "")
            lines.append(f"  {item.name:<17}{item.metadata['help']} [{shown}]")
    return "\n".join(lines)


def register() -> None:
    """Makes the schema and the help known to Hydra; call before hydra.main or compose."""
    # What configs/hydra/launcher/slurm.yaml asks of Slurm follows from the run's own keys.
    OmegaConf.register_new_resolver("gpus_per_node", _gpus_to_ask_for, replace=True)
    OmegaConf.register_new_resolver(
        "ranks_per_node", lambda num_gpus, cpu_procs: _gpus_to_ask_for(num_gpus) or cpu_procs, replace=True
    )
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    template = f"""Train one network with one optimizer; asked again, resume it or print its record.

  python train.py optim=koala-m data=cifar100 num_gpus=2
  python train.py -m optim=koala-m,sgd,adam seed=1,2,3
  python train.py data=ptb data.path=DIR optim=adam optim.lr=1e-3

== Groups (choose with group=name; look inside with group=name --cfg job) ==
$APP_CONFIG_GROUPS
== Keys (override with key=value) ==
{help_text()}

Run folder: <output_root>/<data>/<model>/<optim>/<hash of what matters>/seed<k>
Exit status: 0 finished, 2 bad input (nothing was written), 3 the loss diverged, 130/143 stopped (checkpoint written).
Shell completion: eval "$$(python train.py -sc install=bash)"
"""
    store.store(group="hydra/help", name="koala", node={"app_name": "train", "template": template})


def _gpus_to_ask_for(num_gpus) -> int | None:
    """GPUs of each node of a Slurm job; None for none, since a cluster without GPUs refuses to be asked for 0."""
    if not isinstance(num_gpus, int):
        raise ConfigError(
            f"num_gpus={num_gpus}: give a number for Slurm (0: CPU); the machine that submits cannot know how many "
            "GPUs the nodes have"
        )
    return num_gpus or None


def compose(overrides: list[str]) -> DictConfig:
    """The checked configuration that `python train.py *overrides` would run.

    Raises:
        ConfigError: unknown key, group or option, wrong type, or a value out of range.
    """
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = hydra_compose(PRIMARY, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return check(cfg)


def explain(error: Exception) -> str:
    """One readable message from Hydra's or OmegaConf's nested ones, with the valid names when one is unknown."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if missing := re.search(r"Could not find '([\w-]+)/([^']*)'", text):
        group, option = missing.groups()
        return f"{group}={option}: unknown; {_valid(option, group_options(group))}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    reason = str(cause).splitlines()[0]
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent):
        return f"unknown key {key}; {_valid(key.rpartition('.')[2], parent)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{key}: {reason}" if key else reason
    return text.split(" Config search path")[0]


def bad_input(error: Exception) -> int:
    """Prints what is wrong with the input, in one message, and returns the exit status for it."""
    print(error if isinstance(error, ConfigError) else explain(error), file=sys.stderr)
    return 2


def _valid(name: str, names) -> str:
    close = difflib.get_close_matches(str(name), list(map(str, names)), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(sorted(map(str, names)))}"


def check(cfg: DictConfig) -> DictConfig:
    """`cfg` resolved and checked against the schema, the group files, the optimizer's constructor and the machine.

    Raises:
        ConfigError: naming key, value and what is valid.
    """
    unknown = [key for key in cfg if key not in {item.name for item in fields(Config)}]
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]}; {_valid(unknown[0], [item.name for item in fields(Config)])}")
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    for group in GROUPS:
        _check_group(group, cfg[group])
    _check_ranges(cfg)
    _check_optimizer(cfg.optim)
    if reason := conflict(cfg, cfg.num_nodes * (gpus_per_node(cfg) or cfg.cpu_procs)):
        raise ConfigError(reason)
    return cfg


def group_options(group: str) -> list[str]:
    """Names of the files of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _check_group(group: str, node) -> None:
    """The keys and types of a chosen option are those of its file: the file is the schema."""
    path = CONFIGS / group / f"{node.name}.yaml"
    if not path.exists():
        raise ConfigError(f"{group}.name={node.name}: {_valid(node.name, group_options(group))}")
    defaults = yaml.safe_load(path.read_text()) or {}
    defaults.pop("defaults", None)
    for key, value in node.items():
        if key not in defaults:
            raise ConfigError(f"unknown key {group}.{key}={value}; {_valid(key, defaults)}")
        _check_type(f"{group}.{key}", value, defaults[key])


def _check_type(key: str, value, default) -> None:
    if default is None or value is None or (isinstance(default, str) and default.startswith("${")):
        return
    kind = type(default)
    accepted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(kind)
    wrong = accepted and (not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)))
    # YAML 1.1 reads 1e-3 as a string; a number is meant.
    if wrong and kind in (int, float) and isinstance(value, str):
        raise ConfigError(f"{key}={value!r} must be a number such as {default}")
    if wrong:
        raise ConfigError(f"{key}={value!r} must be of type {kind.__name__}, such as {default!r}")


def _check_ranges(cfg: DictConfig) -> None:
    def require(good: bool, key: str, valid: str):
        if not good:
            raise ConfigError(f"{key}={OmegaConf.select(cfg, key)}: must be {valid}")

    for key in (
        "epochs",
        "batch_size",
        "accumulation",
        "eval_batch_size",
        "num_nodes",
        "cpu_procs",
        "eval_every",
        "log_every",
    ):
        require(cfg[key] >= 1, key, "1 or more")
    for key in ("checkpoint_every", "seed", "max_restarts"):
        require(cfg[key] >= 0, key, "0 or more")
    require(cfg.max_steps is None or cfg.max_steps >= 1, "max_steps", "1 or more, or null")
    require(cfg.grad_clip is None or cfg.grad_clip > 0, "grad_clip", "above 0, or null")
    require(cfg.timeout > 0, "timeout", "above 0 seconds")
    require(cfg.precision in PRECISIONS, "precision", " | ".join(PRECISIONS))
    require(cfg.strategy in STRATEGIES, "strategy", " | ".join(STRATEGIES))
    require(cfg.select in ("last", "best-val"), "select", "last | best-val")
    targets = cfg.targets or {}
    numbers = OmegaConf.is_dict(cfg.targets) and all(isinstance(value, (int, float)) for value in targets.values())
    require(cfg.targets is None or numbers, "targets", "{metric: number}, such as targets={train_loss: 0.5}")
    require(cfg.checkpoint_async in ("auto", True, False), "checkpoint_async", "auto | true | false")
    gpus = torch.cuda.device_count()
    is_count = isinstance(cfg.num_gpus, int) and not isinstance(cfg.num_gpus, bool)
    require(cfg.num_gpus == "auto" or (is_count and cfg.num_gpus >= 0), "num_gpus", f"auto | 0 ... {gpus}")


def check_devices(cfg: DictConfig) -> None:
    """Raises ConfigError when this machine lacks the GPUs asked for. Checked where a run runs."""
    gpus = torch.cuda.device_count()
    if cfg.num_gpus != "auto" and cfg.num_gpus > gpus and not (placed() and gpus == 1):  # one for each task
        raise ConfigError(f"num_gpus={cfg.num_gpus}: this machine has {gpus}; valid: auto | 0 ... {gpus}")


def _check_optimizer(optim: DictConfig) -> None:
    """Builds the optimizer on one dummy weight, so that its own checks speak before any work is done."""
    try:
        kind = get_class(optim._target_)
    except Exception as error:
        raise ConfigError(f"optim={optim.name}: {optim._target_} cannot be imported ({error})") from error
    arguments = constructor_arguments(optim)
    accepted = inspect.signature(kind).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in accepted.values())
    for key in arguments:
        if key not in accepted and not takes_any:
            raise ConfigError(
                f"unknown key optim.{key}; {_valid(key, [name for name in accepted if name != 'params'])}"
            )
    try:
        kind(
            torch.nn.Linear(2, 2) if needs_of(optim).module else [torch.nn.Parameter(torch.zeros(2, 2))],
            **arguments,
        )
    except (ValueError, TypeError, AssertionError) as error:
        shown = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ConfigError(f"optim={optim.name}: {error} (given {shown})") from error


def config_hash(cfg: DictConfig) -> str:
    """12 hexadecimal digits that name all in `cfg` that changes the numbers, but the seed, which is a folder."""
    matter = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key not in IMMATERIAL}
    matter["data"] = {key: value for key, value in matter["data"].items() if key not in IMMATERIAL_DATA}
    text = json.dumps(matter, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_name(cfg: DictConfig) -> str:
    """data/model/optim, the human part of a run's identity."""
    return f"{cfg.data.name}/{cfg.model.name}/{cfg.optim.name}"


def run_dir(cfg: DictConfig) -> Path:
    """The folder that belongs to this run and no other."""
    return Path(cfg.output_root) / run_name(cfg) / config_hash(cfg) / f"seed{cfg.seed}"
