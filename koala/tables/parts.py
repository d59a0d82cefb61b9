"""The parts of a typed YAML file, and the rules that one key keeps; koala.tables.rules has those between keys."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from koala.errors import ConfigError

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


class Part(BaseModel):
    """A mapping of the file. YAML tells numbers from text, so nothing is converted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

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


def _override(text: str) -> str:
    if "=" not in text:
        raise ConfigError("", text, "is not key=value, as on train.py's command line")
    return text


def _seeds(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or min(values) < 0 or len(set(values)) < len(values):
        raise ConfigError("", list(values), "must be at least one number, all different and none below 0")
    return values


def _grid(values: Any) -> Any:
    if not isinstance(values, dict) or len(values) != 1:
        raise ConfigError("", values, "must have one key, the rate that matters most")
    [(name, points)] = values.items()
    numbers = isinstance(points, list) and all(type(point) in (int, float) for point in points)
    if not numbers or len(set(points)) < max(2, len(points)):
        reason = "must be a list of at least two different numbers (in YAML 0.001 and 1.0e-3 are numbers, 1e-3 is text)"
        raise ConfigError(name, points, reason)
    return values


Override = Annotated[str, AfterValidator(_override)]
Number = int | float
Grid = Annotated[dict[str, List[Number]], BeforeValidator(_grid)]


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
    """One number of a cell: where a run keeps it, and how it is shown.

    Either `key` or `record` is set. `key` names a metric of the history, taken `at` the last or the best epoch, or at
    the last evaluation not later than `after_seconds` of training; with `below`, the number is how far training had
    come (in `unit`) when the metric was first at or below that value. `record` is a dotted path into the record
    (`step_ms` is the median of a step), divided by the record's field `per` where given. The number shown is `offset +
    scale * value`. `relative` names a value of the compared axis: the number is then divided by that one's of the same
    seed, measured by the same command. `profile`: it is measured by the runs of this other profile.
    """

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

    @model_validator(mode="after")
    def _has_one_source(self):
        if (self.key is None) == (self.record is None):
            raise ConfigError("key", None, "and record are the two sources of a metric; give exactly one")
        return self

    def of(self, key: Key) -> "Metric":
        """The metric as the cell `key` reads it; fields that differ by an axis which `key` lacks stay as they are."""
        chosen = {}
        for name in ("label", "key", "below"):
            if isinstance(field := getattr(self, name), dict):
                [(axis, values)] = field.items()
                chosen |= {name: values[key[axis]]} if axis in key else {}
        return self.model_copy(update=chosen) if chosen else self

    @property
    def timed(self) -> bool:
        """Whether the number says how fast something was, which what else the machine did changes."""
        source = (self.record or "").partition(".")[0]
        clock = self.below is not None and self.unit == "seconds"
        return clock or self.after_seconds is not None or source in ("step_ms", "seconds", "throughput")

    @property
    def worst(self) -> float:
        """What a failed run counts."""
        return float("-inf") if self.better == "higher" else float("inf")


class Patch(Part):
    """What a profile reads otherwise of a metric."""

    label: str | None = None
    key: str | None = None
    after_seconds: float | None = None
    below: by_axis(float) | None = None
    profile: str | None = None


class Figure(Part):
    """A figure of the experiment's own. `kind` curve: the history's `y` over `x`, one line a compared value;
    sensitivity: the metric `y` over the values of the axis `x`. `published`: (paper, figure) with printed points.
    """

    title: str
    y: str
    x: str = "epoch"
    kind: Literal["curve", "sensitivity"] = "curve"
    log: bool = False
    published: Pair | None = None


class Profile(Part):
    """One way to run the table: the paper's setting (`full`), or a shorter one that says what it is.

    `comparable` is false when its numbers answer to another question than the paper's (other data, other models);
    then no difference to the published value is shown. `grid: false` runs every cell at its own overrides, untuned.
    `timed`: its runs go one at a time, so that their times compare (None: as the table). Grid points are tried with the
    first `trial_seeds` seeds, and the chosen one is run with all of them. `needs` is what its setting takes that does
    not exist; `leaves_out` are cells that it does without.
    """

    name: str = ""  # its key in the file
    about: str = ""
    seeds: Annotated[List[int], AfterValidator(_seeds)]
    trial_seeds: by_axis(int) | None = None
    overrides: List[Override] = ()
    when: List[When] = ()
    needs: List[Reason] = ()
    leaves_out: List[Reason] = ()
    metrics: dict[str, Patch] = {}
    grid: bool = True
    comparable: bool = True
    timed: bool | None = None

    def trials(self, key: Key) -> int | None:
        """With how many seeds the grid points of the cell `key` are tried; None: with all."""
        if not isinstance(self.trial_seeds, dict):
            return self.trial_seeds
        [(axis, counts)] = self.trial_seeds.items()
        return counts[key[axis]]
