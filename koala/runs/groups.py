"""The schema of each group of keys: of choices here, of data and models from their packages, and of an optimizer from
the signature of its constructor, which is the one place that its arguments and their defaults are written down."""

import functools
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from torch.optim import Optimizer

from koala.data import schema_of as schema_of_data
from koala.data.spec import KINDS
from koala.errors import ConfigError
from koala.models import schema_of as schema_of_model
from koala.runs.schema import CHOICES, GROUPS, PRETRAINED, Named, Recipe, Run
from koala.schema import Schema, read
from koala.training.optimizers import SUITE_KEYS

STRICT = ConfigDict(strict=True)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def options(group: str) -> list[str]:
    """Names of the files of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def complete(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a group, checked and with every key that it has.

    Raises:
        ConfigError: naming key, value and what is valid.
    """
    if group == "optim":
        return _optimizer(values)
    if group == "data":
        return _data(values)
    if group == "model":
        return completed(schema_of_model(values), values, group)
    choices, name = CHOICES[group], str(values.get("name", "null"))
    if name not in choices:
        raise ConfigError(f"{group}.name", name, "unknown", valid=choices)
    return completed(choices[name], values, group)


def _data(values: Mapping[str, Any]) -> dict[str, Any]:
    """The data set's keys, and those that say how the papers train on it."""
    schema = schema_of_data(values)
    recipe = {name: value for name, value in values.items() if name in Recipe.model_fields}
    data = {name: value for name, value in values.items() if name not in recipe}
    return completed(schema, data, "data", also=Recipe.model_fields) | completed(Recipe, recipe, "data")


def completed(schema: type[Schema], values: Mapping[str, Any], group: str, also: Iterable[str] = ()) -> dict[str, Any]:
    """`values` as `schema` types them, its defaults filled in; `also`: keys to name among the valid ones."""
    for name in values:
        if name not in schema.model_fields:
            key = f"{group}.{name}" if group else name
            raise ConfigError(key, None, "unknown key", valid=[*schema.model_fields, *also])
    return read(schema, values, group).model_dump()


@functools.cache
def text_keys() -> frozenset[str]:
    """Keys of a run whose values are text, whatever they look like: `output_root=2024_01_15` is no number."""
    schemas = [("", Run), *((f"{group}.", Named) for group in GROUPS), *(("data.", kind) for kind in KINDS.values())]
    schemas += [(f"{group}.", kind) for group, kinds in CHOICES.items() for kind in kinds.values()]
    text = (str, str | None)
    return frozenset(f"model.{name}" for name in PRETRAINED) | frozenset(
        prefix + name
        for prefix, schema in schemas
        for name, field in schema.model_fields.items()
        if field.annotation in text
    )


# Optimizers


def optimizer_class(optim: Mapping[str, Any]) -> type[Optimizer]:
    """The class that `optim._target_` names.

    Raises:
        ConfigError: there is none, or it is no torch optimizer.
    """
    target = optim.get("_target_")
    if not isinstance(target, str):
        given = "null" if target is None else target
        raise ConfigError(
            "optim._target_", given, "names no class", valid="a torch.optim.Optimizer, such as koala.SOFIM"
        )
    try:
        kind = pkgutil.resolve_name(target)  # hydra.utils.get_class logs its failures as well
    except Exception as error:  # whatever importing somebody's module raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("optim._target_", target, f"cannot be imported ({reason})") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError("optim._target_", target, "is no torch.optim.Optimizer")
    return kind


def _optimizer(values: Mapping[str, Any]) -> dict[str, Any]:
    suite = {key: value for key, value in values.items() if key in SUITE_KEYS}
    read(Named, values, "optim")
    keys = constructor_keys(optimizer_class(values))
    arguments = {key: _tuples(value) for key, value in values.items() if key not in SUITE_KEYS}
    return suite | _lists(completed(keys, arguments, "optim"))


@functools.cache
def constructor_keys(kind: type[Optimizer]) -> type[Schema]:
    """What a configuration may pass to a constructor: its named arguments after the first (the parameters).

    An argument whose default no configuration can hold, such as a function, is left to the constructor.
    """
    try:
        signature = inspect.signature(kind, eval_str=True)
    except NameError:  # annotations that only a type checker can resolve
        signature = inspect.signature(kind)
    fields: dict[str, Any] = {}
    for item in list(signature.parameters.values())[1:]:
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD) or item.name == "process_group":
            continue
        required = item.default is item.empty
        if not (required or _can_be_written(item.default)):
            continue
        annotation = _writable(item.annotation) if isinstance(item.annotation, Written) else Any
        if item.default is None:
            annotation = annotation | None if annotation is not Any else Any
        fields[item.name] = (annotation, ... if required else _settled(annotation, item.default))
    return create_model(kind.__name__, __base__=Schema, **fields)


Written = (type, types.UnionType, types.GenericAlias, typing._GenericAlias)


def _writable(annotation: Any) -> Any:
    """`annotation` without what YAML cannot say (tensors, process groups); Any when nothing is left of it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (bool, int, float, str, type(None)) or origin is Literal:
        return annotation
    if origin in (typing.Union, types.UnionType):
        left = [kind for kind in map(_writable, arguments) if kind is not Any]
        return typing.Union[tuple(left)] if left else Any  # noqa: UP007 (of a computed list)
    if origin is tuple:
        return tuple[tuple(item if item is ... else _writable(item) for item in arguments)]
    if origin in (list, Sequence):
        return tuple[_writable(arguments[0]), ...]
    return Any


def _settled(annotation: Any, default: Any) -> Any:
    """`default` as `annotation` types it (1 becomes 1.0), so that a value spelt out is the value left out."""
    try:
        return TypeAdapter(annotation, config=STRICT).validate_python(default)
    except ValidationError:
        return default


def _can_be_written(value: Any) -> bool:
    """Whether YAML has a word for the value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_can_be_written, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_can_be_written, value))
    return value is None or type(value) in (bool, int, float, str)


def _tuples(value: Any) -> Any:
    """Optimizers check tuples such as betas by type or unpack them; YAML has only lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
