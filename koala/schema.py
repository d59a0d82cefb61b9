"""A group of keys, read through a pydantic schema: types, ranges and choices stand with the keys they are of."""

from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError

from koala.errors import ConfigError


class Schema(BaseModel):
    """Typed keys of a group. YAML has said what is a number and what is text, so nothing is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


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
        raise ConfigError(_told(error, group)) from error


def _told(error: ValidationError, group: str) -> str:
    """The first of pydantic's complaints as one line."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # of several keys together: the reason names them
        return f"{group}.{reason}"
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{group}.{key}: is missing"
    return f"{group}.{key}={first['input']!r}: {reason[0].lower()}{reason[1:]}"
