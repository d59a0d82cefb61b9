"""What Hydra makes of overrides: the files that they choose, with their values set; unchecked."""

import copy
import functools
import os
import re
from collections.abc import Iterable
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from koala.errors import ConfigError
from koala.runs import schema
from koala.runs.command_line import typed_later
from koala.runs.groups import CONFIGS
from koala.runs.schema import GROUPS

PRIMARY = "train"
PARAMETERS = "hydra.sweeper.params."  # a sweep's overrides, as its configuration has them
HELP = """Train one network with one optimizer; the same command again resumes it or prints its record.

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
    OmegaConf.register_new_resolver("gpus_per_node", _gpus_of_a_job, replace=True)
    OmegaConf.register_new_resolver(
        "ranks_per_node", lambda num_gpus, cpu_procs: _gpus_of_a_job(num_gpus) or cpu_procs, replace=True
    )
    store = ConfigStore.instance()
    store.store(name="schema", node=dict(schema.DEFAULTS))
    template = HELP.format(keys=schema.help_text())
    store.store(group="hydra/help", name="koala", node={"app_name": "train", "template": template})


def _gpus_of_a_job(num_gpus) -> int | None:
    """GPUs of each node of a Slurm job; None for none, since a cluster without GPUs refuses to be asked for 0."""
    if not isinstance(num_gpus, int):
        reason = "the machine that submits to Slurm cannot know how many GPUs the nodes have"
        raise ConfigError("num_gpus", num_gpus, reason, valid="a number (0: CPU)")
    return num_gpus or None


def hydra_config(overrides: Iterable[str], config_dir: str | None = None, **options: Any) -> DictConfig:
    """What Hydra makes of `overrides`, unchecked.

    Args:
        config_dir: a folder with more files of the groups (Hydra's --config-dir).
        options: those of `hydra.compose`.

    Raises:
        ConfigError: they are no overrides, or name what is not there.
    """
    given = typed_later(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(given)
        choices = tuple(one.input_line for one in parsed if one.key_or_group in GROUPS)
        values = [one for one in parsed if _sets_a_value(one)]
        if options or len(choices) + len(values) < len(parsed):
            return _from_files(given, config_dir, **options)
        cfg = copy.deepcopy(_of_choices(choices, config_dir))
        for one in values:
            OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True, force_add=one.is_force_add())
        return cfg
    except Exception as error:  # of Hydra, its parser, OmegaConf: nothing of ours runs in there
        raise config_error(error) from error


def _sets_a_value(one: Override) -> bool:
    """Whether the override sets one key of a run to one value, and chooses no file."""
    kinds = (OverrideType.CHANGE, OverrideType.FORCE_ADD)
    plain = one.type in kinds and not one.is_sweep_override() and one.package is None and "/" not in one.key_or_group
    return plain and one.key_or_group not in GROUPS and not one.is_hydra_override()


@functools.cache
def _of_choices(choices: tuple[str, ...], config_dir: str | None) -> DictConfig:
    """The files that `choices` name, composed once: the runs of a table differ mostly in values, set afterwards."""
    return _from_files(list(choices), config_dir)


def _from_files(overrides: list[str], config_dir: str | None, **options: Any) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        _search(config_dir)
        return hydra_compose(PRIMARY, overrides, **options)


def _search(config_dir: str | None):
    """The loader of the configuration files, which also looks into `config_dir`."""
    hydra = GlobalHydra.instance().hydra
    if config_dir is not None:
        path = hydra.config_loader.get_search_path()
        path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", anchor="schema")
        hydra.config_loader = ConfigLoaderImpl(path)  # it reads the path once
    return hydra.config_loader


def parsed_sweep(overrides: Iterable[str], config_dir: str | None) -> list[Override]:
    """`overrides` as Hydra parses them, able to list the files of a group (glob); the sweeper's parameters, such
    as `hydra.sweeper.params.seed='1,2'`, as the overrides that they are."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parser = OverridesParser.create(config_loader=_search(config_dir))
        parsed = parser.parse_overrides(list(overrides))
        parameters = [one for one in parsed if one.key_or_group.startswith(PARAMETERS)]
        given = [f"{one.key_or_group.removeprefix(PARAMETERS)}={one.value()}" for one in parameters]
        return [one for one in parsed if one not in parameters] + parser.parse_overrides(given)


def config_error(error: BaseException) -> ConfigError:
    """One refusal from Hydra's or OmegaConf's nested errors, with the valid names when one is unknown."""
    if isinstance(error, ConfigError):
        return error
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    text = text.split(" Config search path")[0].split(" See https")[0]
    if missing := re.search(r"Could not find '([^']*)' Available options in '([^']*)': (.*)", text):
        path, group, names = missing.groups()
        return ConfigError(group, path.removeprefix(f"{group}/"), "unknown", valid=names.split())
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent):
        return ConfigError(key, None, "unknown key", valid=parent)
    if isinstance(cause, OmegaConfBaseException):
        return ConfigError(key or "", None, (str(cause).splitlines() or [""])[0])
    return ConfigError(getattr(error, "override", None) or "", None, text)  # a parse error does not say what it parsed
