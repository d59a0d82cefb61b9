"""What one file of `experiments/` says: which runs make a table, and how their records become its cells.

A file holds axes whose product is the table's cells, the Hydra overrides that each value stands for (exactly what one
would type after `python train.py`), the metrics read from the records, the layout, the published table it answers to,
what it needs that does not exist yet, and its profiles. `experiments/README.md` explains every key.
"""

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

from koala.errors import ConfigError
from koala.tables.metric import Metric, Scalar

FULL = "full"
PAPER, RELEASED, ASSUMED = "paper", "released", "assumed"
NO_SETTING = ("data", "model", "optim", "num_gpus")  # what a cell is, and where it runs: nobody had to choose them


@dataclass(frozen=True)
class Value:
    """One value of an axis: its overrides, its name in the paper's cells, and the grid it is tuned over."""

    name: Scalar
    label: str
    overrides: tuple[str, ...]
    published: dict[str, Scalar]
    grid: dict[str, tuple[Scalar, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """One dimension of a table."""

    name: str
    label: str
    values: tuple[Value, ...]

    def value(self, name: Scalar) -> Value:
        """The value called `name`."""
        return next(value for value in self.values if value.name == name)


@dataclass(frozen=True)
class Rule:
    """Something said of the cells that have all values of `match` (an empty one is every cell)."""

    match: dict[str, tuple[Scalar, ...]]
    overrides: tuple[str, ...] = ()
    reason: str = ""

    def applies(self, cell: dict[str, Scalar]) -> bool:
        """Whether every axis named in the rule has one of its values in `cell`."""
        return all(cell[axis] in values for axis, values in self.match.items())


@dataclass(frozen=True)
class Source(Rule):
    """Where the settings `keys` of the matching cells come from: the paper, its released code, or our assumption."""

    keys: tuple[str, ...] = ()
    source: str = ASSUMED
    note: str = ""


UNSAID = Source({})  # settings that no rule names


@dataclass(frozen=True)
class Setting:
    """One setting of one cell in the full profile: what it is set to (None: by configs/), and by whose word."""

    key: str
    value: str | None
    rule: Source

    @property
    def source(self) -> str:
        """paper, released or assumed."""
        return self.rule.source


@dataclass(frozen=True)
class Drawing:
    """A figure of the experiment's own. `kind` curve: the history's `y` over `x`, one line a compared value;
    sensitivity: the metric `y` over the values of the axis `x`. `published`: (paper, figure) with printed points.
    """

    name: str
    title: str
    kind: str
    x: str
    y: str
    log: bool = False
    published: tuple[str, str] | None = None


@dataclass(frozen=True)
class Profile:
    """One way to run the table: the paper's setting (`full`), or a shorter one that says what it is.

    `comparable` is false when its numbers answer to another question than the paper's (other data, other models);
    then no difference to the published value is shown. `grid: false` runs every cell at its own overrides, untuned.
    `timed`: its runs go one at a time, so that their times compare. Grid points are tried with the first
    `trial_seeds` seeds (which may differ by the values of one axis), and the chosen one is run with all of them.
    `needs` is what its setting takes that does not exist; `leaves_out` are cells that it does without.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    when: tuple[Rule, ...] = ()
    needs: tuple[Rule, ...] = ()
    leaves_out: tuple[Rule, ...] = ()
    metrics: dict[str, dict] = field(default_factory=dict)
    grid: bool = True
    trial_seeds: int | None = None
    trial_seeds_by: tuple[str, dict[Scalar, int]] | None = None
    comparable: bool = True
    timed: bool = False

    def trials(self, key: dict[str, Scalar]) -> int | None:
        """With how many seeds the grid points of the cell `key` are tried; None: with all."""
        return self.trial_seeds_by[1][key[self.trial_seeds_by[0]]] if self.trial_seeds_by else self.trial_seeds


@dataclass(frozen=True)
class Cell:
    """One cell under one profile: what it is, the settings it is tried with, and why it isn't run, if so.

    `settings` has one entry a grid point: the point (empty without a grid) and the complete list of overrides.
    `blocked`: what it would need that does not exist; `left_out`: why the profile does without it.
    """

    key: dict[str, Scalar]
    settings: tuple[tuple[dict[str, Scalar], tuple[str, ...]], ...]
    blocked: str | None = None
    left_out: str | None = None

    @property
    def runs(self) -> bool:
        """Whether the profile runs the cell."""
        return self.blocked is None and self.left_out is None


@dataclass(frozen=True)
class Spec:
    """A whole experiment file."""

    name: str
    path: Path
    title: str
    caption: str
    assumptions: tuple[str, ...]
    sources: tuple[Source, ...]
    published: tuple[str, str] | None
    base: tuple[str, ...]
    axes: tuple[Axis, ...]
    when: tuple[Rule, ...]
    exclude: tuple[Rule, ...]
    needs: tuple[Rule, ...]
    metrics: tuple[Metric, ...]
    choose: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    compare: str
    figures: tuple[Drawing, ...]
    profiles: dict[str, Profile]

    def axis(self, name: str) -> Axis:
        """The axis called `name`."""
        return next(axis for axis in self.axes if axis.name == name)

    def profile(self, name: str) -> Profile:
        """The profile called `name`.

        Raises:
            ConfigError: the file has none of that name.
        """
        if name not in self.profiles:
            raise ConfigError(f"{self.path}: profiles has no {name!r}; valid: {', '.join(self.profiles)}")
        return self.profiles[name]

    def metrics_of(self, profile: Profile) -> tuple[Metric, ...]:
        """The table's metrics as `profile` reads them."""
        return tuple(self._patched(metric, profile.metrics.get(metric.name, {})) for metric in self.metrics)

    def read_by(self, profile: Profile) -> set[str]:
        """The profiles whose runs the table shows under `profile`."""
        return {profile.name, *(metric.profile for metric in self.metrics_of(profile) if metric.profile)}

    @staticmethod
    def _patched(metric: Metric, patch: dict) -> Metric:
        kept = tuple(rule for rule in metric.by_cell if rule[0] not in patch)
        return replace(metric, **(patch | {"by_cell": kept + patch.get("by_cell", ())}))

    def keys(self) -> list[dict[str, Scalar]]:
        """The cells of the table: the product of the axes in their order, less the excluded ones."""
        product = itertools.product(*(axis.values for axis in self.axes))
        keys = [{axis.name: value.name for axis, value in zip(self.axes, values, strict=True)} for values in product]
        return [key for key in keys if not any(rule.applies(key) for rule in self.exclude)]

    def cells(self, profile: Profile) -> list[Cell]:
        """The cells with the overrides that `profile` runs them with; the later of two values of a key wins."""
        return [self.cell(key, profile) for key in self.keys()]

    def rest(self, key: dict[str, Scalar]) -> dict[str, Scalar]:
        """What a cell has in common with those it is compared with: its values of the other axes."""
        return {name: value for name, value in key.items() if name != self.compare}

    def cell(self, key: dict[str, Scalar], profile: Profile) -> Cell:
        """The cell `key` as `profile` runs it."""
        values = [self.axis(name).value(value) for name, value in key.items()]
        blocked = [rule.reason for rule in self.needs + profile.needs if rule.applies(key)]
        left_out = [rule.reason for rule in profile.leaves_out if rule.applies(key)]
        grid = {name: points for value in values for name, points in value.grid.items()} if profile.grid else {}
        points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
        settings = tuple((point, self.overrides(key, profile, point)) for point in points)
        return Cell(key, settings, "; ".join(blocked) or None, "; ".join(left_out) or None)

    def overrides(self, key: dict[str, Scalar], profile: Profile, point: dict[str, Scalar]) -> tuple[str, ...]:
        """What one would type after `python train.py` for the cell `key` at a point of its grid (or beyond it)."""
        found = list(self.base)
        for name, value in key.items():
            found += self.axis(name).value(value).overrides
        for rule in self.when:
            found += rule.overrides if rule.applies(key) else ()
        found += [f"{name}={value}" for name, value in point.items()]
        found += profile.overrides
        for rule in profile.when:
            found += rule.overrides if rule.applies(key) else ()
        return merge_overrides(found)

    def settings(self, key: dict[str, Scalar]) -> list[Setting]:
        """The settings of the cell `key` in the full profile with their sources; what no rule names is assumed."""
        full = self.profile(FULL)
        cell = self.cell(key, full)
        values: dict[str, str | None] = {"seeds": ", ".join(map(str, full.seeds))}
        for override in cell.settings[0][1]:
            name, _, value = override.partition("=")
            values[name] = value
        for name in cell.settings[0][0]:
            values[name] = "one of " + ", ".join(str(point[name]) for point, _ in cell.settings)
        said = [rule for rule in self.sources if rule.applies(key)]
        for rule in said:
            for name in rule.keys:
                values.setdefault(name, None)
        found = []
        for name, value in values.items():
            if name not in (*NO_SETTING, *key):  # an axis is the question, not a setting
                rule = next((rule for rule in reversed(said) if name in rule.keys), UNSAID)
                found.append(Setting(name, value, rule))
        return found

    def optimizer(self, key: dict[str, Scalar]) -> str:
        """The optimizer that the cell `key` runs with, by its name in configs/optim ("" if the file does not say)."""
        return override_value(self.cell(key, self.profile(FULL)).settings[0][1], "optim") or ""

    def published_key(self, key: dict[str, Scalar]) -> dict[str, Scalar]:
        """What the paper's cells call the cell `key`."""
        names: dict[str, Scalar] = {}
        for axis, value in key.items():
            names |= self.axis(axis).value(value).published
        return names


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
