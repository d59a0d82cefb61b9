"""Overrides: what is typed to train.py as Hydra reads it, and what Hydra makes of it; unchecked."""

import contextlib
import copy
import functools
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError, OmegaConfBaseException

from koala.errors import ConfigError, first_line, shown
from koala.run_keys import DEFAULTS, GROUPS, Run
from koala.runs.schema import CONFIGS, TEXT, options

PRIMARY = "train"
HELP = """Train one network with one optimizer; the same command again resumes it or prints its record.

  python train.py optim=koala-m data=cifar100 num_gpus=2          (--optim koala-m --data cifar100 is the same)
  python train.py -m optim=koala-m,sgd,adam seed=1,2,3
  python train.py data=ptb data.path=DIR optim=adam optim.lr=1e-3

== Groups (choose with group=name; look inside with group=name --cfg job) ==
{groups}
Keys below optim are the arguments of the optimizer's constructor, such as optim.nesterov=true.

== Keys (override with key=value) ==
{keys}

Run folder: <output_root>/<data>/<model>/<optim>/<hash of what matters>/seed<k>
Exit status: 0 finished, 2 bad input (nothing was written), 3 the loss diverged, 130/143 stopped (the last line says
at which checkpoint).
Shell completion: eval "$(python train.py -sc install=bash)"      Hydra's own options: python train.py --hydra-help"""
PARAMETERS = "hydra.sweeper.params."  # a sweep's overrides, as its configuration has them


def _gpus_of_a_job(num_gpus) -> int | None:
    """GPUs of each node of a Slurm job; None for none, since a cluster without GPUs refuses to be asked for 0."""
    if not isinstance(num_gpus, int):
        reason = "the machine that submits to Slurm cannot know how many GPUs the nodes have"
        raise ConfigError("num_gpus", num_gpus, reason, valid="a number (0: CPU)")
    return num_gpus or None


# Hydra knows the keys of a run from here; configs/hydra/launcher/slurm.yaml computes a job's size from them.
ConfigStore.instance().store(name="schema", node=dict(DEFAULTS))
OmegaConf.register_new_resolver("gpus_per_node", _gpus_of_a_job, replace=True)
OmegaConf.register_new_resolver("ranks_per_node", lambda gpus, cpus: _gpus_of_a_job(gpus) or cpus, replace=True)


def help_text() -> str:
    """What `python train.py --help` prints: the files of every group, and every key with its default."""
    groups = [
        textwrap.fill(f"  {group}: {', '.join(options(group))}", 120, subsequent_indent="    ") for group in GROUPS
    ]
    keys = [f"  {key:<17}{Run.model_fields[key].description} [{shown(value)}]" for key, value in DEFAULTS.items()]
    return HELP.format(groups="\n".join(groups), keys="\n".join(keys))


# Texts


def command_line(arguments: Sequence[str]) -> list[str]:
    """Arguments of train.py for Hydra: `--optim koala-m` and `--optim=koala-m` are read as `optim=koala-m`. Hydra's own
    options come last, for its parser takes no override after one that follows others."""
    overrides, hydras, rest = [], [], list(arguments)
    of_hydra = {option: action for action in get_args_parser()._actions for option in action.option_strings}
    while rest:
        text = rest.pop(0)
        option, equals, value = text.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if action := of_hydra.get(option):
            hydras.append(text)
            if rest and not equals and (action.nargs is None or rest[0] in (action.choices or ())):
                hydras.append(rest.pop(0))
        elif not option.startswith("--"):
            overrides.append(text)
        elif equals or rest and not rest[0].startswith("-") and "=" not in rest[0]:
            overrides.append(f"{name}={value if equals else rest.pop(0)}")
        else:
            raise ConfigError(option, None, "a value is missing", valid=f"{name}=VALUE or {option} VALUE")
    return readable(overrides) + hydras


def readable(overrides: Iterable[str]) -> list[str]:
    """`overrides` as Hydra reads them as they were typed. Keys in groups are forced: the schema, not the YAML file,
    says which there are; so are those of targets, which are null by default. Values that Hydra cannot read, such as
    /home/josé or ~/data, are quoted.

    Raises:
        ConfigError: a group is set to null or false, which Hydra refuses without its name.
    """
    texts, groups = list(map(_quoted, overrides)), "|".join(GROUPS)
    for text in texts:
        if nothing := re.fullmatch(rf"({groups})=(null|true|false|)", text):
            raise ConfigError(nothing[1], nothing[2] or "null", "one must be chosen", valid=options(nothing[1]))
    return [f"++{text}" if re.match(rf"({groups}|targets)\.[\w.]+=", text) else text for text in texts]


def _quoted(text: str) -> str:
    """The override `text`, with its value quoted where only that lets Hydra read it, or read it as it was typed."""
    key, equals, value = text.partition("=")
    if equals and key.lstrip("+") in TEXT and not re.search(r"[\\'\"(){}\[\]]", value):
        choices = value.split(",")  # several in a sweep
        return f"{key}={','.join(_quoted_text(choice, alone=len(choices) == 1) for choice in choices)}"
    if not equals or _parsed(text) is not None:
        return text
    quoted = f"{key}={_in_quotes(value)}"
    return text if _parsed(quoted) is None else quoted


def _quoted_text(value: str, alone: bool) -> str:
    """A value of a key that is text, in quotes where Hydra would make a number of it, or cut off its blanks."""
    parsed = _parsed(f"key={value}")
    read = parsed.value() if parsed is not None else None
    changed = isinstance(read, bool | int | float) or alone and isinstance(read, str) and read != value
    return _in_quotes(value) if changed or read is None and value not in ("null", "") else value


def _in_quotes(value: str) -> str:
    return QuotedString(os.path.expanduser(value), Quote.single).with_quotes()


def _parsed(text: str) -> Override | None:
    """The override that `text` is to Hydra, if it is one."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


# Composing


def hydra_config(overrides: Iterable[str], config_dir: str | None = None, **options: Any) -> DictConfig:
    """What Hydra makes of `overrides`, unchecked.

    Args:
        config_dir: a folder with more files of the groups (Hydra's --config-dir).
        options: those of `hydra.compose`.

    Raises:
        ConfigError: they are no overrides, or name what is not there.
    """
    texts = readable(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(texts)
        values = [one for one in parsed if one.key_or_group not in GROUPS]
        kinds = (OverrideType.CHANGE, OverrideType.FORCE_ADD)
        if options or not all(
            one.type in kinds
            and not one.is_sweep_override()
            and one.package is None
            and not one.is_hydra_override()
            and "/" not in one.key_or_group
            for one in values
        ):
            return copy.deepcopy(_from_files(tuple(texts), config_dir, **options))
        # The runs of a table differ mostly in values: its few choices of files are composed once
        choices = tuple(one.input_line for one in parsed if one.key_or_group in GROUPS)
        cfg = copy.deepcopy(_from_files(choices, config_dir))
        for one in values:
            OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True, force_add=one.is_force_add())
        return cfg
    except Exception as error:  # of Hydra, its parser, OmegaConf: nothing of ours runs in there
        raise config_error(error) from error


@functools.lru_cache(100)
def _from_files(overrides: tuple[str, ...], config_dir: str | None, **options: Any) -> DictConfig:
    with _loader(config_dir):
        return hydra_compose(PRIMARY, list(overrides), **options)


@contextlib.contextmanager
def _loader(config_dir: str | None) -> Iterator[ConfigLoader]:
    """Hydra's loader of the configuration files, which also looks into `config_dir`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        if config_dir is not None:
            path = hydra.config_loader.get_search_path()
            path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", anchor="schema")
            hydra.config_loader = ConfigLoaderImpl(path)  # it reads the path once
        yield hydra.config_loader


def parsed_sweep(overrides: Iterable[str], config_dir: str | None) -> list[Override]:
    """`overrides` as Hydra parses them, able to list the files of a group (glob); the sweeper's parameters, such
    as `hydra.sweeper.params.seed='1,2'`, as the overrides that they are."""
    with _loader(config_dir) as loader:
        parser = OverridesParser.create(config_loader=loader)
        parsed = parser.parse_overrides(list(overrides))
        parameters = [one for one in parsed if f"{one.key_or_group}.".startswith(PARAMETERS)]
        given: dict[str, Any] = {}
        for one in parameters:
            key = one.key_or_group.removeprefix(PARAMETERS)
            given |= {key: one.value()} if key != one.key_or_group else one.value() or {}  # one of them, or all
        texts = [f"{key}={value}" for key, value in given.items()]
        return [one for one in parsed if one not in parameters] + parser.parse_overrides(texts)


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
        in_groups = [f"{group}.{key}" for group in GROUPS if key in (parent.get(group) or {})]  # optim.lr for lr
        return ConfigError(key, None, "unknown key", valid=in_groups or parent)
    if isinstance(cause, InterpolationKeyError):
        missing = re.search("'(.*)'", str(cause))[1]
        return ConfigError(missing, None, f"is missing, and {key} takes its value from it")
    if isinstance(cause, OmegaConfBaseException):
        return ConfigError(key or "", None, first_line(cause))
    override = getattr(error, "override", None) or ""  # a parse error does not say what it parsed
    if override and "=" not in override:
        return ConfigError(override, None, "is no override", valid="KEY=VALUE, in quotes if there are blanks in it")
    return ConfigError(override, None, text)
