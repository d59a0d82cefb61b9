"""Reads and checks `experiments/<name>.yaml`; what its keys mean stands in experiments/README.md."""

from itertools import groupby
from pathlib import Path

from koala.tables.figures import INTERNALS
from koala.tables.metric import Metric, Scalar
from koala.tables.reader import Node, read_yaml
from koala.tables.spec import ASSUMED, FULL, PAPER, RELEASED, Axis, Drawing, Profile, Rule, Source, Spec, Value

CLOCKS = ("epoch", "step", "seconds")
# The columns of metrics.jsonl, whatever is trained; only some runs have each of them.
HISTORY = (
    *(f"{split}_{name}" for split in ("test", "val", "train")
      for name in ("loss", "top1_error", "top5_error", "ppl", "ppl_by_batch")),
    "train_generator_loss", "fid", "feature_distance", "lr",
)  # fmt: skip
FILTERED = "filter_"  # begins the columns of what a filter estimates


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
    if not rows:
        raise node.error("rows", "must name at least one axis", names)
    if sorted(rows + columns) != sorted(names):
        raise node.error("rows", f"and columns must name every axis once, not {list(rows + columns)}", names)
    metrics = tuple(_metric(item, axes) for item in node.children("metrics"))
    published = node.strings("published", ())
    if len(published) not in (0, 2):
        raise node.error("published", f"must be [paper, table], not {list(published)}")
    spec = Spec(
        name=name,
        path=path,
        title=node.text("title"),
        caption=node.text("caption", ""),
        assumptions=node.strings("assumptions", ()),
        sources=tuple(_sources(node, axes)),
        published=published or None,
        base=_overrides(node, "base"),
        axes=axes,
        when=_rules(node, "when", axes),
        exclude=_rules(node, "exclude", axes),
        needs=_rules(node, "needs", axes),
        metrics=metrics,
        choose=node.text("choose", ""),
        figures=tuple(_drawing(item, axes, metrics) for item in node.children("figures", optional=True)),
        rows=rows,
        columns=columns,
        compare=node.choice("compare", names, rows[-1]),
        profiles=_profiles(node, axes, metrics),
    )
    if FULL not in spec.profiles:
        raise node.error("profiles", f"must have {FULL!r}", spec.profiles)
    _check_grids(spec, node)
    _check_times(spec, node)
    node.done()
    return spec


def _check_grids(spec: Spec, node: Node) -> None:
    """Every compared value gets the same number of trials over one rate of its own, and validation chooses."""
    tuned = any(value.grid for axis in spec.axes for value in axis.values)
    if tuned and not spec.choose:
        raise node.error("choose", "is missing: a grid needs the metric that chooses its best point, e.g. val_loss")
    if spec.choose and not spec.choose.startswith("val_"):
        raise node.error("choose", f"is {spec.choose!r}; only validation may choose", ["val_loss, val_top1_error, ..."])
    rest = lambda cell: str(spec.rest(cell.key))  # noqa: E731
    for profile in spec.profiles.values() if tuned else ():
        cells = sorted((cell for cell in spec.cells(profile) if cell.runs), key=rest)
        for _, group in groupby(cells, key=rest):
            trials = {cell.key[spec.compare]: len(cell.settings) for cell in group}
            if len(set(trials.values())) > 1:
                raise node.error(
                    "axes", f"gives {spec.compare} unequal numbers of trials: {trials}; they must be equal"
                )


def _check_times(spec: Spec, node: Node) -> None:
    known = [value.name for value in spec.axis(spec.compare).values]
    for metric in spec.metrics:
        if metric.relative is not None and metric.relative not in known:
            raise node.error(f"metrics.{metric.name}.relative", f"is {metric.relative!r}", known)
    for profile in spec.profiles.values():
        for metric in spec.metrics_of(profile):
            runs = spec.profiles.get(metric.profile or profile.name)
            if runs is None or any(other.profile for other in spec.metrics_of(runs) if runs is not profile):
                plain = [name for name, known in spec.profiles.items() if known is not profile]
                raise node.error(
                    f"profiles.{profile.name}.metrics.{metric.name}.profile", f"is {metric.profile!r}", plain
                )
            if metric.timed and not runs.timed:
                raise node.error(
                    "timed", f"must be true: metrics.{metric.name} is a time, which needs runs one at a time"
                )
    for drawing in spec.figures:
        if drawing.x == "seconds" and not spec.profile(FULL).timed:
            raise node.error("timed", f"must be true: figures.{drawing.name} is over seconds")


def _sources(node: Node, axes: tuple[Axis, ...]) -> list[Source]:
    found = []
    for item in node.items("sources"):
        match = _match(item, axes)
        word = item.choice("source", (PAPER, RELEASED, ASSUMED))
        found.append(Source(match, keys=item.strings("keys"), source=word, note=item.text("note", "")))
        item.done()
    return found


def _drawing(node: Node, axes: tuple[Axis, ...], metrics: tuple[Metric, ...]) -> Drawing:
    published = node.strings("published", ())
    if len(published) not in (0, 2):
        raise node.error("published", f"must be [paper, figure], not {list(published)}")
    drawing = Drawing(
        name=str(node.name),
        title=node.text("title"),
        kind=node.choice("kind", ("curve", "sensitivity"), "curve"),
        x=node.text("x", "epoch"),
        y=node.text("y"),
        log=node.flag("log", False),
        published=published or None,
    )
    if drawing.kind == "curve":
        valid = {"x": CLOCKS, "y": (*HISTORY, *INTERNALS, f"{FILTERED}R", f"{FILTERED}...")}
        own = drawing.y.startswith(FILTERED)  # each filter has its own
    else:
        numeric = [axis.name for axis in axes if all(type(value.name) in (int, float) for value in axis.values)]
        valid, own = {"x": numeric, "y": [metric.name for metric in metrics]}, False
    if drawing.x not in valid["x"]:
        raise node.error("x", f"is {drawing.x!r}", valid["x"] or ["(no axis has numbers for values)"])
    if drawing.y not in valid["y"] and not own:
        raise node.error("y", f"is {drawing.y!r}", valid["y"])
    node.done()
    return drawing


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
                grid=item.grid("grid"),
            )
        )
        item.done()
    axis = Axis(node.name, node.text("label", str(node.name)), tuple(values))
    node.done()
    return axis


def _metric(node: Node, axes: tuple[Axis, ...]) -> Metric:
    rules = tuple(_by_cell(node, field, axes) for field in ("key", "below") if isinstance(node.values.get(field), dict))
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
        relative=node.scalar("relative", None),
        published=node.text("published", None),
        published_std=node.text("published_std", None),
        scale=node.number("scale", 1.0),
        offset=node.number("offset", 0.0),
        better=node.choice("better", ("lower", "higher", "neither"), "lower"),
        digits=node.whole("digits", 2),
        duration=node.flag("duration", False),
        by_cell=rules,
    )
    if (metric.key is None) == (metric.record is None):
        raise node.error("key", "and record are the two sources of a metric; give exactly one")
    node.done()
    return metric


def _by_cell(node: Node, field: str, axes: tuple[Axis, ...]) -> tuple[str, str, dict[Scalar, Scalar]]:
    """Reads `field: {axis: {value: ...}}`, and leaves the first value in its place."""
    given = node.values[field]
    known = {axis.name: [value.name for value in axis.values] for axis in axes}
    if len(given) != 1 or next(iter(given)) not in known:
        raise node.error(field, f"must be one value, or {{axis: {{value: ...}}}} with one axis, not {given!r}", known)
    [(axis, values)] = given.items()
    if not isinstance(values, dict) or set(values) != set(known[axis]):
        raise node.error(f"{field}.{axis}", f"must have every value of the axis, not {values!r}", known[axis])
    node.values[field] = next(iter(values.values()))
    return field, axis, values


def _profiles(node: Node, axes: tuple[Axis, ...], metrics: tuple[Metric, ...]) -> dict[str, Profile]:
    timed = node.flag("timed", False)
    return {item.name: _profile(item, axes, metrics, timed) for item in node.children("profiles")}


def _profile(node: Node, axes: tuple[Axis, ...], metrics: tuple[Metric, ...], timed: bool) -> Profile:
    patches = {}
    for item in node.children("metrics", optional=True):
        if item.name not in {metric.name for metric in metrics}:
            raise node.error("metrics", f"patches {item.name!r}", [metric.name for metric in metrics])
        rules = tuple(_by_cell(item, field, axes) for field in ("below",) if isinstance(item.values.get(field), dict))
        patches[item.name] = {key: item.number(key) for key in ("after_seconds", "below") if item.has(key)}
        patches[item.name]["by_cell"] = rules
        patches[item.name] |= {key: item.text(key) for key in ("key", "label", "profile") if item.has(key)}
        item.done()
    seeds, trials_by = node.seeds("seeds"), None
    if isinstance(node.values.get("trial_seeds"), dict):
        trials_by = _by_cell(node, "trial_seeds", axes)[1:]
        for count in trials_by[1].values():
            node.values["trial_seeds"] = count
            node.whole("trial_seeds", least=1, most=len(seeds))
    profile = Profile(
        name=node.name,
        about=node.text("about", ""),
        seeds=seeds,
        overrides=_overrides(node, "overrides"),
        when=_rules(node, "when", axes),
        needs=_rules(node, "needs", axes),
        leaves_out=_rules(node, "leaves_out", axes),
        metrics=patches,
        grid=node.flag("grid", True),
        trial_seeds=node.whole("trial_seeds", None, least=1, most=len(seeds)),
        trial_seeds_by=trials_by,
        comparable=node.flag("comparable", True),
        timed=node.flag("timed", timed),
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
        match = _match(item, axes)
        if key == "when":
            rules.append(Rule(match, overrides=_overrides(item, "overrides")))
        elif key == "exclude":
            rules.append(Rule(match))
        else:  # a cell without a reason would be run
            rules.append(Rule(match, reason=item.text("reason")))
            if not rules[-1].reason:
                raise item.error("reason", "is empty; it must say what the cell waits for, or why it is left out")
        item.done()
    return tuple(rules)


def _match(item: Node, axes: tuple[Axis, ...]) -> dict[str, tuple[Scalar, ...]]:
    match = {
        name: tuple(values) if isinstance(values, list) else (values,)
        for name, values in item.scalars("match", {}).items()
    }
    known = {axis.name: [value.name for value in axis.values] for axis in axes}
    for name, values in match.items():
        if name not in known:
            raise item.error("match", f"names the axis {name!r}", known)
        for value in values:
            if value not in known[name]:
                raise item.error(f"match.{name}", f"has no value {value!r}", known[name])
    return match
