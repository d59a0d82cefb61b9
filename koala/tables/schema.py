"""Mappings of YAML files, checked by pydantic, and the error that names the file, the key and what is valid."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from koala.errors import ConfigError
from koala.schema import valid as valid_text

T = TypeVar("T")
Scalar = str | int | float | bool
Key = dict[str, Scalar]  # a cell: the value of every axis
List = Annotated[tuple[T, ...], Strict(False)]  # a list in YAML
OneOrMore = Annotated[tuple[T, ...], Strict(False), BeforeValidator(lambda v: v if isinstance(v, list) else [v])]
Pair = Annotated[tuple[str, str], Strict(False)]


def by_axis(kind: Any) -> Any:
    """One value of this type, or `{axis: {value: ...}}`: one for every value of an axis."""
    many = dict[str, dict[Scalar, kind]]
    either = Annotated[kind, Tag("one")] | Annotated[many, Tag("by axis"), Field(min_length=1, max_length=1)]
    return Annotated[either, Discriminator(lambda given: "by axis" if isinstance(given, dict) else "one")]


def refuse(key: str, reason: str, valid: Any = None) -> PydanticCustomError:
    """The error for `key` of the mapping that is being checked; `valid`: what would be."""
    return PydanticCustomError("refused", "{reason}", {"key": key, "reason": reason, "valid": valid})


class Part(BaseModel):
    """A mapping of the file. YAML has said what is a number and what is text, so nothing is converted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise refuse(str(key), f"is no key here; {valid_text(key, cls.model_fields)}")
        return {} if given is None else given


def read_yaml(path: Path) -> dict:
    """The mapping in the file `path`, read with YAML's safe loader.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file must be a mapping, not {values!r}")
    return values


def parse(kind: type[BaseModel], values: dict, path: Path) -> Any:
    """The values of the file `path` as a `kind`.

    Raises:
        ConfigError: naming the file, the key, its value and what is valid.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        context = fault.get("ctx", {})
        members = ("one", "by axis", "str", "int", "float", "bool")  # of a union: no keys
        parts = [str(part) for part in fault["loc"] if part not in members]
        key = ".".join(part for part in (*parts, context.get("key")) if part)
        value = "" if fault["type"] in ("missing", "refused") else f", not {fault['input']!r}"
        valid = f"; valid: {', '.join(map(str, context['valid']))}" if context.get("valid") else ""
        raise ConfigError(f"{path}: {key}: {fault['msg'].replace('tuple', 'list')}{value}{valid}") from None
