"""A group of keys, read through a pydantic schema: types, ranges and choices stand with the keys they are of."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError

from koala.errors import ConfigError


class Schema(BaseModel):
    """Typed keys of a group. YAML has said what is a number and what is text, so nothing is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


Read = TypeVar("Read", bound=Schema)


def read(schema: type[Read], cfg: Mapping[str, Any], group: str) -> Read:
    """Returns the keys of ``cfg`` that ``schema`` has, checked; the others may be somebody else's.

    Raises:
        ConfigError: naming group, key, value and what is valid.
    """
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_told(error, f"{group}." if group else "")) from error


def unknown(name: str, names: Iterable[str], group: str) -> ConfigError:
    """The error for a key that a group does not have."""
    return ConfigError(f"unknown key {group}.{name}; {valid(name, names)}" if group else
                       f"unknown key {name}; {valid(name, names)}")  # fmt: skip


def valid(name: str, names: Iterable[str]) -> str:
    """The valid names in words, and the one that was probably meant."""
    names = sorted(map(str, names))
    close = difflib.get_close_matches(str(name), names, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"valid: {', '.join(names)}"


def _told(error: ValidationError, prefix: str) -> str:
    """The first of pydantic's complaints as one line; of a key of several types, what each says."""
    faults = error.errors(include_url=False)
    first = faults[0]
    if not first["loc"]:  # of several keys together: the reason names them
        return prefix + first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{prefix}{'.'.join(map(str, first['loc']))}: is missing"
    own = [fault for fault in faults if fault["loc"][0] == first["loc"][0]]
    depth = next(
        (at for at, parts in enumerate(zip(*(fault["loc"] for fault in own), strict=False)) if len(set(parts)) > 1),
        min(len(fault["loc"]) for fault in own),
    )
    shown = repr(first["input"])
    reasons = dict.fromkeys(fault["msg"].removeprefix("Value error, ") for fault in own)
    reason = " or ".join(text[0].lower() + text[1:] for text in reasons)
    key = ".".join(map(str, first["loc"][:depth]))
    return f"{prefix}{key}={shown if len(shown) < 100 else shown[:100] + '...'}: {reason}"
