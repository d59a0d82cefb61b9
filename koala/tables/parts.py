"""The parts of an experiment file, typed; `experiments/README.md` explains every key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_validator

from koala.errors import ConfigError
from koala.schema import Schema

FULL = "full"  # the profile of the paper's setting, which every file has
PAPER, RELEASED, ASSUMED = "paper", "released", "assumed"
T = TypeVar("T")
Scalar = str | int | float | bool
Key = dict[str, Scalar]  # a cell: the value of every axis
List = Annotated[tuple[T, ...], Strict(False)]  # a list in YAML
OneOrMore = Annotated[tuple[T, ...], Strict(False), BeforeValidator(lambda v: v if isinstance(v, list) else [v])]
Pair = Annotated[tuple[str, str], Strict(False)]


def by_axis(kind: Any) -> Any:
    """One value of this type, or `{axis: {value: ...}}`: one for every value of an axis."""
    return kind | Annotated[dict[str, dict[Scalar, kind]], Field(min_length=1, max_length=1)]


def of_cell(value: Any, key: Key) -> Any:
    """What a field of `by_axis` is in the cell `key`; one that differs by an axis which `key` lacks stays as it is."""
    if isinstance(value, dict):
        [(axis, values)] = value.items()
        return values[key[axis]] if axis in key else value
    return value


def one_of(key: str, value: Any, valid: Any) -> None:
    """Raises ConfigError where `value` is not in `valid`."""
    if value not in valid:
        raise ConfigError(key, value, "is none of what there is", valid=valid or "nothing here")


class Part(Schema, extra="forbid"):
    """A mapping of the file; a key without a value is an empty one."""

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise ConfigError(key, None, "is no key here", valid=cls.model_fields)
        return {} if given is None else given


def read_yaml(path: Path) -> dict:
    """The mapping in the file `path`, read with YAML's safe loader.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(path, None, f"is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(path, values, "is not a mapping")
    return values


def _different(values: tuple) -> tuple:
    if not values or len(set(values)) < len(values):
        raise ConfigError("", list(values), "must be some values, all different")
    return values


Override = Annotated[str, Field(pattern="^[^=]+=")]  # key=value, as on train.py's command line
Seeds = Annotated[List[Annotated[int, Field(ge=0)]], AfterValidator(_different)]
Rates = Annotated[List[int | float], AfterValidator(_different), Field(min_length=2)]
Grid = Annotated[dict[str, Rates], Field(min_length=1, max_length=1)]  # of the rate that matters most


class Exclude(Part):
    """The cells that have all values of `match` (every cell without one)."""

    match: dict[str, OneOrMore[Scalar]] = {}

    def applies(self, key: Key) -> bool:
        """Whether every axis of `match` has one of its values in the cell `key`."""
        return all(key[axis] in values for axis, values in self.match.items())


class When(Exclude):
    """Overrides for some cells."""

    overrides: List[Override] = ()


class Reason(Exclude):
    """Why some cells are not run."""

    reason: Annotated[str, Field(min_length=1)]


class Source(Exclude):
    """Where the settings `keys` of some cells come from: the paper, its released code, or our assumption."""

    keys: List[str] = ()
    source: Literal["paper", "released", "assumed"] = ASSUMED
    note: str = ""


UNNAMED = Source()  # of settings that no rule names


class Value(Part):
    """One value of an axis: its overrides, its name in the paper's cells, and the grid it is tuned over."""

    label: str | None = None
    overrides: List[Override] | None = None
    published: Key | None = None
    grid: Grid = {}


class Axis(Part):
    """One dimension of a table."""

    label: str | None = None
    values: Annotated[dict[Scalar, Value], Field(min_length=1)]


class Metric(Part):
    """One number of a cell: where a run keeps it (`key` of its history or `record`), and how it is shown."""

    label: by_axis(str)
    key: by_axis(str) | None = None
    at: Literal["last", "best"] = "last"
    after_seconds: float | None = None
    below: by_axis(float) | None = None
    unit: Literal["epoch", "step", "seconds"] = "seconds"
    record: str | None = None
    per: str | None = None
    relative: Scalar | None = None
    profile: str | None = None
    published: str | None = None
    published_std: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    better: Literal["lower", "higher", "neither"] = "lower"
    digits: Annotated[int, Field(ge=0)] = 2
    duration: bool = False

    def of(self, key: Key) -> "Metric":
        """The metric as the cell `key` reads it."""
        return self.model_copy(update={name: of_cell(getattr(self, name), key) for name in ("label", "key", "below")})

    @property
    def timed(self) -> bool:
        """Whether the number says how fast something was, which what else the machine did changes."""
        source = (self.record or "").partition(".")[0]
        clock = self.below is not None and self.unit == "seconds"
        return clock or self.after_seconds is not None or source in ("step_ms", "seconds", "throughput")


class Patch(Part):
    """What a profile reads otherwise of a metric."""

    label: str | None = None
    key: str | None = None
    after_seconds: float | None = None
    below: by_axis(float) | None = None
    profile: str | None = None


class Figure(Part):
    """A figure of the experiment's own: curves of the history's `y`, or the metric `y` over the values of an axis."""

    title: str
    y: str
    x: str = "epoch"
    kind: Literal["curve", "sensitivity"] = "curve"
    log: bool = False
    published: Pair | None = None


class Profile(Part):
    """One way to run the table: the paper's setting (`full`), or a shorter one that says what it is."""

    name: str = ""  # its key in the file
    about: str = ""
    seeds: Seeds
    trial_seeds: by_axis(int) | None = None
    overrides: List[Override] = ()
    when: List[When] = ()
    needs: List[Reason] = ()
    leaves_out: List[Reason] = ()
    metrics: dict[str, Patch] = {}
    grid: bool = True
    comparable: bool = True
    timed: bool | None = None


@dataclass(frozen=True)
class Setting:
    """One setting of one cell in the full profile: what it is set to (None: by configs/), and where that is from."""

    key: str
    value: str | None
    rule: Source


@dataclass(frozen=True)
class Cell:
    """One cell under one profile: the settings it is tried with, and why it isn't run, if so.

    `settings` has one entry a grid point: the point (empty without a grid) and the complete list of overrides.
    `blocked`: what it would need that does not exist; `left_out`: why the profile does without it.
    """

    key: Key
    settings: tuple[tuple[Key, tuple[str, ...]], ...]
    blocked: str = ""
    left_out: str = ""

    @property
    def runs(self) -> bool:
        """Whether the profile runs the cell."""
        return not self.blocked and not self.left_out
