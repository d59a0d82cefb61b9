"""What one file of `experiments/` says: which runs make a table, and how their records become its cells.

A file holds axes whose product is the table's cells, the Hydra overrides that each value stands for (exactly what one
would type after `python train.py`), the metrics read from the records, the layout, the published table it answers to,
what it needs that does not exist yet, and its profiles. `experiments/README.md` explains every key.
"""

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

from koala.tables.reader import Node, read_yaml

FULL = "full"
Scalar = str | int | float | bool


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
class Metric:
    """One number of a cell and where a run keeps it. Either `key` or `record` is set.

    `key` names a metric of the history, taken `at` the last or the best epoch, or at the last evaluation not later than
    `after_seconds` of training; with `below`, the number is how far training had come (in `unit`) when the metric was
    first at or below that value. `record` is a dotted path into the record, divided by the record's field `per` where
    given. The shown number is `offset + scale * value`.
    """

    name: str
    label: str
    key: str | None = None
    at: str = "last"
    after_seconds: float | None = None
    below: float | None = None
    unit: str = "seconds"
    record: str | None = None
    per: str | None = None
    published: str | None = None
    published_std: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    better: str = "lower"
    digits: int = 2
    duration: bool = False


@dataclass(frozen=True)
class Rule:
    """Overrides or a missing need for the cells that have all values of `match` (an empty one is every cell)."""

    match: dict[str, tuple[Scalar, ...]]
    overrides: tuple[str, ...] = ()
    reason: str = ""

    def applies(self, cell: dict[str, Scalar]) -> bool:
        """Whether every axis named in the rule has one of its values in `cell`."""
        return all(cell[axis] in values for axis, values in self.match.items())


@dataclass(frozen=True)
class Profile:
    """One way to run the table: the paper's setting (`full`), or a shorter one that says what it is.

    `comparable` is false when its numbers answer to another question than the paper's (other data, other models);
    then no difference to the published value is shown. `grid: false` runs every cell at its own overrides, untuned.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    when: tuple[Rule, ...] = ()
    needs: tuple[Rule, ...] = ()
    metrics: dict[str, dict] = field(default_factory=dict)
    grid: bool = True
    comparable: bool = True


@dataclass(frozen=True)
class Cell:
    """One cell under one profile: what it is, the settings it is tried with, and why it can't be run, if so.

    `settings` has one entry a grid point: the point (empty without a grid) and the complete list of overrides.
    """

    key: dict[str, Scalar]
    settings: tuple[tuple[dict[str, Scalar], tuple[str, ...]], ...]
    blocked: str | None = None


@dataclass(frozen=True)
class Spec:
    """A whole experiment file."""

    name: str
    path: Path
    title: str
    caption: str
    assumptions: tuple[str, ...]
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
            raise Node(self.profiles, self.path).error("profiles", f"has no {name!r}", self.profiles)
        return self.profiles[name]

    def metrics_of(self, profile: Profile) -> tuple[Metric, ...]:
        """The table's metrics as `profile` reads them."""
        return tuple(replace(metric, **profile.metrics.get(metric.name, {})) for metric in self.metrics)

    def keys(self) -> list[dict[str, Scalar]]:
        """The cells of the table: the product of the axes in their order, less the excluded ones."""
        product = itertools.product(*(axis.values for axis in self.axes))
        keys = [{axis.name: value.name for axis, value in zip(self.axes, values, strict=True)} for values in product]
        return [key for key in keys if not any(rule.applies(key) for rule in self.exclude)]

    def cells(self, profile: Profile) -> list[Cell]:
        """The cells with the overrides that `profile` runs them with; the later of two values of a key wins."""
        return [self._cell(key, profile) for key in self.keys()]

    def _cell(self, key: dict[str, Scalar], profile: Profile) -> Cell:
        values = [self.axis(name).value(value) for name, value in key.items()]
        blocked = [rule.reason for rule in self.needs + profile.needs if rule.applies(key)]
        overrides = list(self.base)
        for value in values:
            overrides += value.overrides
        for rule in self.when:
            overrides += rule.overrides if rule.applies(key) else ()
        grid = {name: points for value in values for name, points in value.grid.items()} if profile.grid else {}
        settings = []
        for points in itertools.product(*grid.values()):
            point = dict(zip(grid, points, strict=True))
            after = [f"{name}={value}" for name, value in point.items()] + list(profile.overrides)
            for rule in profile.when:
                after += rule.overrides if rule.applies(key) else ()
            settings.append((point, merge_overrides(overrides + after)))
        return Cell(key, tuple(settings), "; ".join(blocked) or None)

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


def find_specs(root: Path) -> list[str]:
    """Names of all experiment files below `root`, e.g. "koala/table2", in the order of the papers."""
    names = [path.relative_to(root).with_suffix("").as_posix() for path in Path(root).rglob("*.yaml")]

    def order(name: str) -> tuple:
        folder, _, table = name.rpartition("/")
        return folder, table.startswith("supplement"), table

    return sorted(names, key=order)


def load_spec(root: Path, name: str) -> Spec:
    """Reads and checks `<root>/<name>.yaml`.

    Raises:
        ConfigError: there is no such file, or one of its keys is missing, unknown or of the wrong type; the message
            names the file and the key.
    """
    path = Path(root) / f"{name}.yaml"
    node = read_yaml(path, known=find_specs(root))
    axes = tuple(_axis(item) for item in node.children("axes"))
    names = [axis.name for axis in axes]
    rows, columns = node.strings("rows"), node.strings("columns", ())
    if sorted(rows + columns) != sorted(names):
        raise node.error("rows", f"and columns must name every axis once, not {list(rows + columns)}", names)
    metrics = tuple(_metric(item) for item in node.children("metrics"))
    published = node.strings("published", ())
    if len(published) not in (0, 2):
        raise node.error("published", f"must be [paper, table], not {list(published)}")
    spec = Spec(
        name=name,
        path=path,
        title=node.text("title"),
        caption=node.text("caption", ""),
        assumptions=node.strings("assumptions", ()),
        published=published or None,
        base=_overrides(node, "base"),
        axes=axes,
        when=_rules(node, "when", axes),
        exclude=_rules(node, "exclude", axes),
        needs=_rules(node, "needs", axes),
        metrics=metrics,
        choose=node.text("choose", ""),
        rows=rows,
        columns=columns,
        compare=node.choice("compare", names, rows[-1]),
        profiles={item.name: _profile(item, axes, metrics) for item in node.children("profiles")},
    )
    if any(value.grid for axis in axes for value in axis.values) and not spec.choose:
        raise node.error("choose", "is missing: a grid needs the metric that chooses its best point, e.g. val_loss")
    if FULL not in spec.profiles:
        raise node.error("profiles", f"must have {FULL!r}", spec.profiles)
    node.done()
    return spec


def _axis(node: Node) -> Axis:
    values = []
    for item in node.children("values"):
        given = item.has("overrides")
        values.append(
            Value(
                name=item.name,
                label=item.text("label", str(item.name)),
                overrides=_overrides(item, "overrides") if given else (f"{node.name}={item.name}",),
                published=item.scalars("published", {node.name: item.name}),
                grid={name: tuple(points) for name, points in item.lists("grid").items()},
            )
        )
        item.done()
    axis = Axis(node.name, node.text("label", str(node.name)), tuple(values))
    node.done()
    return axis


def _metric(node: Node) -> Metric:
    metric = Metric(
        name=node.name,
        label=node.text("label"),
        key=node.text("key", None),
        at=node.choice("at", ("last", "best"), "last"),
        after_seconds=node.number("after_seconds", None),
        below=node.number("below", None),
        unit=node.choice("unit", ("epoch", "step", "seconds"), "seconds"),
        record=node.text("record", None),
        per=node.text("per", None),
        published=node.text("published", None),
        published_std=node.text("published_std", None),
        scale=node.number("scale", 1.0),
        offset=node.number("offset", 0.0),
        better=node.choice("better", ("lower", "higher", "neither"), "lower"),
        digits=int(node.number("digits", 2)),
        duration=node.flag("duration", False),
    )
    if (metric.key is None) == (metric.record is None):
        raise node.error("key", "and record are the two sources of a metric; give exactly one")
    node.done()
    return metric


def _profile(node: Node, axes: tuple[Axis, ...], metrics: tuple[Metric, ...]) -> Profile:
    patches = {}
    for item in node.children("metrics", optional=True):
        if item.name not in {metric.name for metric in metrics}:
            raise node.error("metrics", f"patches {item.name!r}", [metric.name for metric in metrics])
        patches[item.name] = {key: item.number(key) for key in ("after_seconds", "below") if item.has(key)}
        item.done()
    profile = Profile(
        name=node.name,
        about=node.text("about", ""),
        seeds=tuple(int(seed) for seed in node.numbers("seeds")),
        overrides=_overrides(node, "overrides"),
        when=_rules(node, "when", axes),
        needs=_rules(node, "needs", axes),
        metrics=patches,
        grid=node.flag("grid", True),
        comparable=node.flag("comparable", True),
    )
    node.done()
    return profile


def _overrides(node: Node, key: str) -> tuple[str, ...]:
    overrides = node.strings(key, ())
    for override in overrides:
        if "=" not in override:
            raise node.error(key, f"has {override!r}, which is not key=value as on train.py's command line")
    return overrides


def _rules(node: Node, key: str, axes: tuple[Axis, ...]) -> tuple[Rule, ...]:
    rules = []
    for item in node.items(key):
        match = {
            name: values if isinstance(values, list) else [values] for name, values in item.scalars("match", {}).items()
        }
        for name, values in match.items():
            known = {axis.name: [value.name for value in axis.values] for axis in axes}
            if name not in known:
                raise item.error("match", f"names the axis {name!r}", known)
            for value in values:
                if value not in known[name]:
                    raise item.error(f"match.{name}", f"has no value {value!r}", known[name])
        matched = {name: tuple(values) for name, values in match.items()}
        rules.append(Rule(matched, _overrides(item, "overrides"), item.text("reason", "")))
        item.done()
    return tuple(rules)
