"""The keys of a run's groups, but for those of models (koala/models), and of optimizers, which the signatures of their
constructors give. koala.run_keys has those of the run itself."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError, create_model
from torch.optim import Optimizer

from koala import models
from koala.data.spec import ImageSpec, SentenceSpec, TextSpec
from koala.errors import ConfigError
from koala.run_keys import GROUPS, PRETRAINED, Count, Positive, Run
from koala.schema import Schema, Word
from koala.training.optimizers import optimizer_class

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Recipe(Schema):
    """Keys of configs/data that speak to the trainer: how the papers train on this data set. They act through other
    keys (epochs=${data.epochs}), so that they are no part of the data."""

    weight_decay: float = Field(0.0, ge=0)
    epochs: Positive = 1
    batch_size: Positive = 1
    eval_batch_size: Positive = 500
    grad_clip: float | None = Field(None, gt=0)
    select: Literal["last", "best-val"] = "last"
    milestones: dict[Positive, list[Positive]] = {}
    gamma: float = Field(0.1, gt=0)


class ImageData(ImageSpec, Recipe):
    """data.kind=images"""

    model_config = ConfigDict(extra="forbid")


class SentenceData(SentenceSpec, Recipe):
    """data.kind=sentences"""

    model_config = ConfigDict(extra="forbid")


class TextData(TextSpec, Recipe):
    """data.kind=text"""

    model_config = ConfigDict(extra="forbid")


class Step(Schema):
    """schedule=step"""

    name: Literal["step"]
    milestones: list[Positive] | dict[Positive, list[Positive]]
    gamma: float = Field(gt=0)


class Plateau(Schema):
    """schedule=plateau"""

    name: Literal["plateau"]
    gamma: float = Field(0.25, gt=0, lt=1)
    patience: Count = 0


class Cosine(Schema):
    """schedule=cosine"""

    name: Literal["cosine"]
    final: float = Field(0.0, ge=0, le=1)
    warmup: float = Field(0.0, ge=0)
    by: Literal["step", "epoch"] = "step"
    length: Positive | Annotated[float, Field(gt=0)] | None = None


class Constant(Schema):
    """schedule=constant"""

    name: Literal["constant"]


class Lookahead(Schema):
    """wrapper=lookahead"""

    name: Literal["lookahead"]
    k: Positive = 5
    alpha: float = Field(0.8, ge=0, le=1)


class WeightAverage(Schema):
    """wrapper=swa"""

    name: Literal["swa"]
    start: float = Field(0.75, ge=0, le=1)
    every: Positive = 5


class Nothing(Schema):
    """wrapper=none, logger=none"""

    name: Literal["none"]


class Wandb(Schema):
    """logger=wandb"""

    name: Literal["wandb"]
    project: str = Field("koala", min_length=1, max_length=128)
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []


# By group, the key that says which of its schemas holds, and these.
CHOICES: dict[str, tuple[str, dict[str, type[Schema]]]] = {
    "data": ("kind", {"images": ImageData, "sentences": SentenceData, "text": TextData}),
    "schedule": ("name", {"step": Step, "plateau": Plateau, "cosine": Cosine, "constant": Constant}),
    "wrapper": ("name", {"none": Nothing, "lookahead": Lookahead, "swa": WeightAverage}),
    "logger": ("name", {"none": Nothing, "wandb": Wandb}),
}
# Keys whose values are text, whatever they look like: `output_root=2024_01_15` is no number.
TEXT = {f"{group}.name" for group in GROUPS} | {f"model.{name}" for name in PRETRAINED} | {
    prefix + name
    for prefix, schema in [("", Run), *((f"{group}.", one) for group in CHOICES for one in CHOICES[group][1].values())]
    for name, field in schema.model_fields.items()
    if field.annotation in (str, str | None)
}  # fmt: skip


def options(group: str) -> list[str]:
    """Names of the files of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def schema_of(group: str, values: Mapping[str, Any]) -> type[Schema]:
    """The schema of a group that has these `values`.

    Raises:
        ConfigError: what they name is not there.
    """
    if group == "model":
        return models.schema_of(values)
    if group == "optim":
        return constructor_keys(optimizer_class(values))
    key, schemas = CHOICES[group]
    value = str(values.get(key, "null"))
    if value not in schemas:
        raise ConfigError(f"{group}.{key}", value, "unknown", valid=schemas)
    return schemas[value]


@functools.cache
def constructor_keys(kind: type[Optimizer]) -> type[Schema]:
    """What a configuration may say of an optimizer: its name, and the named arguments of its constructor after the
    first (the parameters), the one place where these and their defaults are written down.

    An argument whose default no configuration can hold, such as a function, is left to the constructor.
    """
    try:
        signature = inspect.signature(kind, eval_str=True)
    except NameError:  # annotations that only a type checker can resolve
        signature = inspect.signature(kind)
    fields: dict[str, Any] = {"name": (Word, ...)}
    for item in list(signature.parameters.values())[1:]:
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD) or item.name == "process_group":
            continue
        annotation = _writable(item.annotation)
        if item.default is item.empty:
            fields[item.name] = (annotation, ...)
        elif _is_plain(item.default):
            annotation = annotation | None if item.default is None and annotation is not Any else annotation
            fields[item.name] = (annotation, _typed(item.default, annotation))
    return create_model(kind.__name__, __base__=Schema, **fields)


def _writable(annotation: Any) -> Any:
    """`annotation` without what YAML cannot say (tensors, process groups); Any when nothing is left of it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (bool, int, float, str, type(None)) or origin is Literal:
        return annotation
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in map(_writable, arguments) if kind is not Any]
        return typing.Union[tuple(kinds)] if kinds else Any  # noqa: UP007 (of a computed list)
    if origin in (list, Sequence):
        arguments = (arguments[0], ...)
    elif origin is not tuple:
        return Any
    # YAML has no tuples: their list is read as one
    return Annotated[tuple[tuple(item if item is ... else _writable(item) for item in arguments)], Strict(False)]


def _is_plain(default: Any) -> bool:
    """Whether YAML has words for the value."""
    try:
        json.dumps(default)
    except TypeError:
        return False
    return True


def _typed(default: Any, annotation: Any) -> Any:
    """`default` as `annotation` types it (1 becomes 1.0), so that a value spelt out is the value left out."""
    try:
        return TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(default)
    except ValidationError:
        return default
