"""Every key of a run: type, range, default, help, and whether it can change a number. The keys of its groups are here
too, but for those of models (koala/models), and of optimizers, which the signatures of their constructors give."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, create_model
from torch.optim import Optimizer

from koala import models
from koala.data.spec import ImageSpec, TextSpec
from koala.errors import ConfigError
from koala.schema import Schema, Word
from koala.training.optimizers import optimizer_class

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]


def key(default: Any, text: str, *, material: bool = True, **limits: Any) -> Any:
    """A key of a run: its default, its line of help, and its range; `material`: whether it can change a number."""
    return Field(default, description=text, json_schema_extra={"material": material}, **limits)


def _auto_or(least: int, words: str):
    """A whole number of at least `least`, or "auto"."""

    def check(value):
        if value != "auto" and (type(value) is not int or value < least):
            raise ValueError(f"must be {words}")
        return value

    return BeforeValidator(check)


class Run(Schema):
    """Every top-level key of a run; `python train.py --help` prints this list."""

    data: dict[str, Any] = key(..., "data set (group)")
    model: dict[str, Any] = key(..., "model (group; the default depends on data)")
    optim: dict[str, Any] = key(..., "optimizer (group)")
    schedule: dict[str, Any] = key(..., "learning-rate schedule (group; the default depends on data)")
    wrapper: dict[str, Any] = key(..., "around the optimizer (group)")
    logger: dict[str, Any] = key(..., "mirror of the records (group)", material=False)

    seed: Count = key(1, "weights, order of the samples, augmentation, dropout", material=False)
    epochs: Positive = key("${data.epochs}", "passes over the training set")
    max_steps: Positive | None = key(None, "stop after so many optimizer steps, whatever the epochs say")
    batch_size: Positive = key("${data.batch_size}", "global: over all ranks and accumulation steps")
    accumulation: Positive = key(1, "split each rank's batch in so many forward-backward passes")
    eval_batch_size: Positive = key(
        "${data.eval_batch_size}", "of evaluation, per rank; does not change the metrics", material=False
    )
    grad_clip: float | None = key("${data.grad_clip}", "largest global gradient norm, applied before the step", gt=0)
    select: Literal["last", "best-val"] = key(
        "${data.select}", "model that is reported: last | best-val (then tested once)"
    )
    targets: dict[str, float] | None = key(
        None, "{metric: value}; the epoch, step and seconds of first reaching each are recorded", material=False
    )
    objective: str = key("val_loss", "metric of the final row that a sweeper minimises", material=False)

    ranks: Annotated[int | str, _auto_or(1, "auto | 1 | 2 ...")] = key(
        "auto", "what the numbers are to be those of: auto (as many as work now) | n (resume a run of n ranks)"
    )
    num_gpus: Annotated[int | str, _auto_or(0, "auto | 0 | 1 ...")] = key(
        "auto", "GPUs on each node: auto (all) | 0 (CPU) | n", material=False
    )
    num_nodes: Positive = key(1, "machines; above 1 start with torchrun, srun or a Slurm launcher", material=False)
    cpu_procs: Positive = key(1, "ranks when num_gpus=0", material=False)
    strategy: Literal["ddp", "fsdp"] = key("ddp", "how ranks share the model: ddp | fsdp", material=False)
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = key(
        "fp32", "fp32 | tf32 (GPUs) | bf16 (autocast) | fp64 (for exact comparisons)"
    )
    sync_bn: bool = key(False, "BatchNorm normalises over the samples of all ranks")
    compile: bool = key(False, "torch.compile the model", material=False)
    channels_last: bool = key(
        True, "memory layout of image models; on CPUs only where its kernels are safe", material=False
    )
    deterministic: bool = key(False, "torch's deterministic algorithms only", material=False)

    output_root: str = key("outputs", "run folders go here", material=False, min_length=1)
    data_root: str = key("data", "caches of decoded data sets go here", material=False, min_length=1)
    eval_every: Positive = key(1, "epochs between evaluations")
    checkpoint_every: float = key(
        60.0, "seconds of training between checkpoints; 0: at every step", material=False, ge=0
    )
    checkpoint_async: Literal["auto", True, False] = key(
        "auto", "write checkpoints beside training: auto (on GPUs) | true | false", material=False
    )
    log_every: Positive = key(20, "steps between log lines (each waits for the device)", material=False)
    timeout: float = key(
        1800.0, "seconds after which ranks that wait for a hung one give up", material=False, gt=0, le=1e8
    )
    max_restarts: Count = key(
        0, "times that workers are started again, from the checkpoint, after one died", material=False
    )
    resume: bool = key(True, "resume from the last checkpoint; false: refuse if there is one", material=False)
    rerun: bool = key(False, "move a finished or unfinished run aside and start again", material=False)


PRETRAINED = ("pretrained", "weights")  # keys of models that name a local file or folder, or something of a hub
GROUPS = tuple(name for name, field in Run.model_fields.items() if field.is_required())
DEFAULTS = {name: field.default for name, field in Run.model_fields.items() if not field.is_required()}
IMMATERIAL = frozenset(name for name, field in Run.model_fields.items() if not field.json_schema_extra["material"])


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
    "data": ("kind", {"images": ImageData, "text": TextData}),
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
