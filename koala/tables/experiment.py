"""What one file of `experiments/` says: which runs make a table, and how their records become its numbers.

`experiments/README.md` explains every key; koala.tables.parts has their types. Imports neither torch nor Hydra.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from koala import schema
from koala.errors import ConfigError
from koala.metrics import COLUMNS
from koala.tables import parts
from koala.tables.parts import (
    FULL,
    UNNAMED,
    Cell,
    Key,
    List,
    Metric,
    Part,
    Profile,
    Setting,
    of_cell,
    one_of,
)

NO_SETTING = ("data", "model", "optim", "num_gpus")  # with the axes: what the table asks for, and the hardware
CLOCKS = ("epoch", "step", "seconds")
FILTERED = "filter_"  # begins the columns of what one filter estimates
HISTORY = (*COLUMNS, "lr")  # of metrics.jsonl, whatever is trained; only some runs have each of them


class Experiment(Part):
    """A file of `experiments/`, checked; `name` and `path` are the file's own."""

    name: str = ""
    path: Path | None = None
    title: str
    caption: str = ""
    assumptions: List[str] = ()
    sources: List[parts.Source] = ()
    published: parts.Pair | None = None
    base: List[parts.Override] = ()
    axes: Annotated[dict[str, parts.Axis], Field(min_length=1)]
    when: List[parts.When] = ()
    exclude: List[parts.Exclude] = ()
    needs: List[parts.Reason] = ()
    metrics: Annotated[dict[str, Metric], Field(min_length=1)]
    choose: str = ""
    rows: Annotated[List[str], Field(min_length=1)]
    columns: List[str] = ()
    compare: str = ""
    figures: dict[str, parts.Figure] = {}
    timed: bool = False
    profiles: Annotated[dict[str, Profile], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _fills_in(cls, given: Any) -> Any:
        """What follows from other keys: the compared axis, and each profile's name and whether it is timed."""
        rows, profiles = given.get("rows"), given.get("profiles")
        default = {"compare": rows[-1]} if isinstance(rows, list) and rows else {}
        if isinstance(profiles, dict):
            timed = {"timed": given.get("timed", False)}
            profiles = {name: timed | each | {"name": name} if isinstance(each, dict) else each
                        for name, each in profiles.items()}  # fmt: skip
            given = given | {"profiles": profiles}
        return default | given

    @model_validator(mode="after")
    def _keeps_the_rules(self):
        for rule in (_names, _profiles, _times, _figures, _trials):
            rule(self)
        return self

    def profile(self, name: str) -> Profile:
        """The profile called `name`.

        Raises:
            ConfigError: the file has none of that name.
        """
        one_of(f"{self.path}: profiles", name, self.profiles)
        return self.profiles[name]

    def metrics_of(self, profile: Profile) -> dict[str, Metric]:
        """The table's metrics as `profile` reads them."""
        patches = {name: patch.model_dump(exclude_unset=True) for name, patch in profile.metrics.items()}
        return {name: metric.model_copy(update=patches.get(name)) for name, metric in self.metrics.items()}

    def read_by(self, profile: Profile) -> set[str]:
        """The profiles whose runs the table shows under `profile`."""
        return {profile.name, *(metric.profile for metric in self.metrics_of(profile).values() if metric.profile)}

    def keys(self) -> list[Key]:
        """The cells of the table: the product of the axes in their order, less the excluded ones."""
        product = itertools.product(*(axis.values for axis in self.axes.values()))
        keys = [dict(zip(self.axes, values, strict=True)) for values in product]
        return [key for key in keys if not any(rule.applies(key) for rule in self.exclude)]

    def cells(self, profile: Profile) -> list[Cell]:
        """The cells as `profile` runs them."""
        return [self.cell(key, profile) for key in self.keys()]

    def cell(self, key: Key, profile: Profile) -> Cell:
        """The cell `key` as `profile` runs it."""
        blocked = [rule.reason for rule in self.needs + profile.needs if rule.applies(key)]
        left_out = [rule.reason for rule in profile.leaves_out if rule.applies(key)]
        grid = self.axes[self.compare].values[key[self.compare]].grid if profile.grid else {}
        points = [{name: rate} for name, rates in grid.items() for rate in rates] or [{}]
        settings = tuple((point, self.overrides(key, profile, point)) for point in points)
        return Cell(key, settings, "; ".join(blocked), "; ".join(left_out))

    def overrides(self, key: Key, profile: Profile, point: Key) -> tuple[str, ...]:
        """What one would type after `python train.py` for the cell `key` at a point of its grid (or outside of it)."""
        given = list(self.base)
        for (axis, name), value in zip(key.items(), self._values(key), strict=True):
            given += [f"{axis}={name}"] if value.overrides is None else value.overrides
        given += [text for rule in self.when if rule.applies(key) for text in rule.overrides]
        given += [f"{name}={value}" for name, value in point.items()]
        given += profile.overrides
        given += [text for rule in profile.when if rule.applies(key) for text in rule.overrides]
        return merge_overrides(given)

    def settings(self, key: Key) -> list[Setting]:
        """The settings of the cell `key` in the full profile with their sources; what no rule names is assumed."""
        full = self.profile(FULL)
        tried = self.cell(key, full).settings
        values: dict[str, str | None] = {"seeds": ", ".join(map(str, full.seeds))}
        values |= override_values(tried[0][1])
        for name in tried[0][0]:
            values[name] = "one of " + ", ".join(str(point[name]) for point, _ in tried)
        rules = {name: rule for rule in self.sources if rule.applies(key) for name in rule.keys}  # the last one wins
        values |= {name: None for name in rules if name not in values}
        questions = (*NO_SETTING, *key)
        return [Setting(name, values[name], rules.get(name, UNNAMED)) for name in values if name not in questions]

    def rest(self, key: Key) -> Key:
        """What a cell has in common with those it is compared with: its values of the other axes."""
        return {name: value for name, value in key.items() if name != self.compare}

    def optimizer(self, key: Key) -> str:
        """The optimizer that the cell `key` runs with, by its name in configs/optim ("" if the file does not say)."""
        return override_values(self.overrides(key, self.profile(FULL), {})).get("optim", "")

    def published_key(self, key: Key) -> Key:
        """What the paper's cells call the cell `key`."""
        names: Key = {}
        for (axis, name), value in zip(key.items(), self._values(key), strict=True):
            names |= {axis: name} if value.published is None else value.published
        return names

    def labels(self, key: Key) -> list[str]:
        """What the table calls each value of `key`."""
        return [value.label or str(name) for name, value in zip(key.values(), self._values(key), strict=True)]

    def _values(self, key: Key) -> list[parts.Value]:
        return [self.axes[axis].values[name] for axis, name in key.items()]


def _parts(part: Part, key: str = "") -> Iterator[tuple[str, Part]]:
    """The part and every part in it, with their keys."""
    yield key, part
    for name, value in part:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
        for at, item in items:
            if isinstance(item, Part):
                yield from _parts(item, f"{key}.{name}.{at}".lstrip("."))


def _names(experiment: Experiment) -> None:
    """Whatever names an axis or a value names one that there is, and what differs by an axis has all its values."""
    axes, named = experiment.axes, experiment.rows + experiment.columns
    if sorted(named) != sorted(axes):
        raise ConfigError("rows", list(named), "with columns must name every axis once", valid=axes)
    one_of("compare", experiment.compare, axes)
    for key, part in _parts(experiment):
        for axis, values in part.match.items() if isinstance(part, parts.Exclude) else ():
            one_of(f"{key}.match", axis, axes)
            for value in values:
                one_of(f"{key}.match.{axis}", value, list(axes[axis].values))
        if isinstance(part, Metric) and (part.key is None) == (part.record is None):
            raise ConfigError(f"{key}.key", None, "and record are the two sources of a metric; give exactly one")
        for field in ("label", "key", "below", "trial_seeds"):
            if isinstance(by := getattr(part, field, None), dict):
                [(axis, values)] = by.items()
                one_of(f"{key}.{field}", axis, axes)
                if values.keys() != (valid := axes[axis].values.keys()):
                    raise ConfigError(f"{key}.{field}.{axis}", values, "must have every value of the axis", valid=valid)

    for key in experiment.keys():
        heads = Counter(metric.of(key).label for metric in experiment.metrics.values())
        if twice := [label for label, count in heads.items() if count > 1]:
            raise ConfigError("metrics", twice[0], "is the label of two of them")
    for name, axis in axes.items():
        if len({value.label or str(key) for key, value in axis.values.items()}) < len(axis.values):
            raise ConfigError(f"axes.{name}.values", list(axis.values), "must have different labels")


def _profiles(experiment: Experiment) -> None:
    if FULL not in experiment.profiles:
        raise ConfigError("profiles", list(experiment.profiles), f"must have {FULL!r}")
    for name, profile in experiment.profiles.items():
        for metric in profile.metrics:
            one_of(f"profiles.{name}.metrics", metric, experiment.metrics)
        most = len(profile.seeds)
        for count in (of_cell(profile.trial_seeds, key) for key in experiment.keys()):
            if count is not None and not 1 <= count <= most:
                raise ConfigError(f"profiles.{name}.trial_seeds", count, "is out of range", valid=f"1 to {most}")


def _times(experiment: Experiment) -> None:
    """What is divided by another value's number, and what is a time, has runs that allow it."""
    for name, metric in experiment.metrics.items():
        if metric.relative is not None:
            one_of(f"metrics.{name}.relative", metric.relative, list(experiment.axes[experiment.compare].values))
    for profile in experiment.profiles.values():
        for name, metric in experiment.metrics_of(profile).items():
            runs = experiment.profiles.get(metric.profile or profile.name)
            if runs is None or runs is not profile and experiment.read_by(runs) != {runs.name}:
                others = [other for other in experiment.profiles if other != profile.name]
                key = f"profiles.{profile.name}.metrics.{name}.profile"
                raise ConfigError(key, metric.profile, "is no profile that measures it", valid=others)
            if metric.timed and not runs.timed:
                reason = f"metrics.{name} is a time, which needs runs one at a time"
                raise ConfigError("timed", False, reason, valid="true")


def _figures(experiment: Experiment) -> None:
    numbers = [name for name, axis in experiment.axes.items() if {int, float} >= {type(value) for value in axis.values}]
    for name, figure in experiment.figures.items():
        curve = figure.kind == "curve"
        one_of(f"figures.{name}.x", figure.x, CLOCKS if curve else numbers)
        if not (curve and figure.y.startswith(FILTERED)):
            one_of(f"figures.{name}.y", figure.y, [*HISTORY, f"{FILTERED}R"] if curve else experiment.metrics)
        if figure.x == "seconds" and not experiment.profile(FULL).timed:
            raise ConfigError("timed", False, f"figures.{name} is over seconds", valid="true")


def _trials(experiment: Experiment) -> None:
    """Every compared value gets the same number of trials over one rate of its own, and validation chooses."""
    tuned = [name for name, axis in experiment.axes.items() if any(value.grid for value in axis.values.values())]
    if tuned not in ([], [experiment.compare]):
        raise ConfigError("compare", experiment.compare, "is not the one axis whose values have grids", valid=tuned)
    if tuned and not experiment.choose or experiment.choose and not experiment.choose.startswith("val_"):
        reason = "a grid needs the validation metric that chooses its best point"
        raise ConfigError("choose", experiment.choose, reason, valid="val_loss, val_top1_error, ...")
    for profile in experiment.profiles.values() if tuned else ():
        groups: dict[str, dict] = {}
        for cell in filter(lambda cell: cell.runs, experiment.cells(profile)):
            groups.setdefault(str(experiment.rest(cell.key)), {})[cell.key[experiment.compare]] = len(cell.settings)
        for trials in groups.values():
            if len(set(trials.values())) > 1:
                raise ConfigError("axes", trials, f"gives {experiment.compare} unequal numbers of trials")


def merge_overrides(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides with one entry a key; the last one given wins and keeps its place."""
    last: dict[str, str] = {}
    for override in reversed(list(overrides)):
        last.setdefault(override.partition("=")[0].lstrip("+"), override)
    return tuple(reversed(last.values()))


def override_values(overrides: Iterable[str]) -> dict[str, str]:
    """What `overrides` set each key to, as written."""
    return dict(text.lstrip("+").split("=", 1) for text in overrides)


def find_experiments(root: Path) -> list[str]:
    """Names of all experiment files below `root`, e.g. "koala/table2", in the order of the papers."""
    names = [path.relative_to(root).with_suffix("").as_posix() for path in Path(root).rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.rpartition("/")[0], "/supplement" in name, name))


def load_experiment(root: Path, name: str) -> Experiment:
    """Reads and checks `<root>/<name>.yaml`.

    Raises:
        ConfigError: there is no such file, or one of its keys is missing, unknown or of the wrong type; the message
            names the file and the key.
    """
    path = Path(root) / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(path, None, "does not exist", valid=find_experiments(root))
    return schema.check(Experiment, parts.read_yaml(path) | {"name": name, "path": path}, f"{path}: ")
