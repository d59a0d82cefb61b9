"""What one file of `experiments/` says: which runs make a table, and how their records become its numbers.

`experiments/README.md` explains every key; koala.tables.parts has their types. Imports neither torch nor Hydra.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from koala import schema
from koala.errors import ConfigError
from koala.tables import parts
from koala.tables.parts import UNNAMED, Key, List, Metric, Part, Profile, Source, read_yaml
from koala.tables.rules import FULL, check

NO_SETTING = ("data", "model", "optim", "num_gpus")  # the cell itself, and the hardware: nobody had to choose them


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
    blocked: str | None = None
    left_out: str | None = None

    @property
    def runs(self) -> bool:
        """Whether the profile runs the cell."""
        return self.blocked is None and self.left_out is None


class Experiment(Part):
    """A file of `experiments/`, checked; `name` and `path` are the file's own."""

    name: str = ""
    path: Path | None = None
    title: str
    caption: str = ""
    assumptions: List[str] = ()
    sources: List[Source] = ()
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
        if not isinstance(given, dict):
            return given
        rows, profiles = given.get("rows"), given.get("profiles")
        default = {"compare": rows[-1]} if isinstance(rows, list) and rows else {}
        if isinstance(profiles, dict):
            timed = {"timed": given.get("timed", False)}
            named = {name: timed | item | {"name": name} if isinstance(item, dict) else item
                     for name, item in profiles.items()}  # fmt: skip
            given = given | {"profiles": named}
        return default | given

    @model_validator(mode="after")
    def _keeps_the_rules(self):
        check(self)
        return self

    def profile(self, name: str) -> Profile:
        """The profile called `name`.

        Raises:
            ConfigError: the file has none of that name.
        """
        if name not in self.profiles:
            raise ConfigError(f"{self.path}: profiles", name, "is none of them", valid=self.profiles)
        return self.profiles[name]

    def metrics_of(self, profile: Profile) -> dict[str, Metric]:
        """The table's metrics as `profile` reads them."""
        patch = lambda name: profile.metrics[name].model_dump(exclude_unset=True) if name in profile.metrics else {}  # noqa: E731
        return {name: metric.model_copy(update=patch(name)) for name, metric in self.metrics.items()}

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
        grid = {name: points for value in self._values(key) for name, points in value.grid.items() if profile.grid}
        points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
        settings = tuple((point, self.overrides(key, profile, point)) for point in points)
        return Cell(key, settings, "; ".join(blocked) or None, "; ".join(left_out) or None)

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
        cell = self.cell(key, full)
        values: dict[str, str | None] = {"seeds": ", ".join(map(str, full.seeds))}
        values |= dict(override.split("=", 1) for override in cell.settings[0][1])
        for name in cell.settings[0][0]:
            values[name] = "one of " + ", ".join(str(point[name]) for point, _ in cell.settings)
        rules = [rule for rule in self.sources if rule.applies(key)]
        values |= {name: None for rule in rules for name in rule.keys if name not in values}
        last = {name: rule for rule in rules for name in rule.keys}
        settings = (
            name for name in values if name not in (*NO_SETTING, *key)
        )  # an axis is the question, not a setting
        return [Setting(name, values[name], last.get(name, UNNAMED)) for name in settings]

    def rest(self, key: Key) -> Key:
        """What a cell has in common with those it is compared with: its values of the other axes."""
        return {name: value for name, value in key.items() if name != self.compare}

    def optimizer(self, key: Key) -> str:
        """The optimizer that the cell `key` runs with, by its name in configs/optim ("" if the file does not say)."""
        return override_value(self.cell(key, self.profile(FULL)).settings[0][1], "optim") or ""

    def published_key(self, key: Key) -> Key:
        """What the paper's cells call the cell `key`."""
        names: Key = {}
        for (axis, name), value in zip(key.items(), self._values(key), strict=True):
            names |= {axis: name} if value.published is None else value.published
        return names

    def axis_label(self, axis: str) -> str:
        """What the table calls an axis."""
        return self.axes[axis].label or axis

    def labels(self, key: Key) -> list[str]:
        """What the table calls each value of `key`."""
        return [value.label or str(name) for name, value in zip(key.values(), self._values(key), strict=True)]

    def _values(self, key: Key) -> list[parts.Value]:
        return [self.axes[axis].values[name] for axis, name in key.items()]


def merge_overrides(overrides: list[str]) -> tuple[str, ...]:
    """The overrides with one entry a key; the last one given wins and keeps its place."""
    last: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        last.pop(key, None)
        last[key] = override
    return tuple(last.values())


def override_value(overrides: tuple[str, ...], key: str) -> str | None:
    """What `overrides` set `key` to, as written, or None."""
    return next((text.partition("=")[2] for text in overrides if text.startswith(f"{key}=")), None)


def find_experiments(root: Path) -> list[str]:
    """Names of all experiment files below `root`, e.g. "koala/table2", in the order of the papers."""
    names = [path.relative_to(root).with_suffix("").as_posix() for path in Path(root).rglob("*.yaml")]
    parts = lambda name: (name.rpartition("/")[0], "/supplement" in name, name)  # noqa: E731
    return sorted(names, key=parts)


def load_experiment(root: Path, name: str) -> Experiment:
    """Reads and checks `<root>/<name>.yaml`.

    Raises:
        ConfigError: there is no such file, or one of its keys is missing, unknown or of the wrong type; the message
            names the file and the key.
    """
    path = Path(root) / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(path, None, "does not exist", valid=find_experiments(root))
    return schema.check(Experiment, read_yaml(path) | {"name": name, "path": path}, f"{path}: ")
