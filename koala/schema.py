"""Whatever is read from outside, checked by pydantic: configurations, experiments and records."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from koala.errors import ConfigError


class Schema(BaseModel):
    """Typed keys of a group. YAML tells numbers from text, so nothing is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=64)]  # names a folder
Kind = TypeVar("Kind")


def check(kind: type[Kind], value: Any, prefix: str) -> Kind:
    """Returns ``value`` as ``kind`` types it.

    Args:
        kind: a Schema, a TypedDict, or any type that pydantic knows.
        value: plain, or a part of a configuration.
        prefix: what stands before the keys of ``value`` in a message: a group and a dot, or a file.

    Raises:
        ConfigError: naming the first bad key, its value, why, and what is valid.
    """
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise _first(error, kind, prefix) from error


_adapter = functools.cache(TypeAdapter)


def _first(error: ValidationError, kind: Any, prefix: str) -> ConfigError:
    """The first of pydantic's complaints, unknown keys before others; of a key of several types, what each complains
    of."""
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    first = faults[0]
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{prefix}{first['loc'][-1]}", None, "unknown key", valid=kind.model_fields)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # of a validator that knows which of several keys is wrong
        key = ".".join(filter(None, (*map(str, first["loc"]), cause.key)))
        return ConfigError(f"{prefix}{key}", cause.value, cause.reason, valid=cause.valid)
    if first["type"] == "missing":
        return ConfigError(prefix + ".".join(map(str, first["loc"])), None, "is missing")
    if not first["loc"]:
        return ConfigError(prefix.rstrip(".: "), first["input"], _reason(first))
    same = [fault for fault in faults if fault["loc"][0] == first["loc"][0]]
    depth = next(
        (at for at, parts in enumerate(zip(*(fault["loc"] for fault in same), strict=False)) if len(set(parts)) > 1),
        min(len(fault["loc"]) for fault in same),
    )
    reasons = dict.fromkeys(map(_reason, same))
    value = "null" if first["input"] is None else first["input"]
    return ConfigError(prefix + ".".join(map(str, first["loc"][:depth])), value, " or ".join(reasons))


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "string_unicode":  # how Python shows what it cannot decode
        return "has bytes that are no text in this locale (UTF-8 text: LC_ALL=C.UTF-8)"
    text = fault["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]
