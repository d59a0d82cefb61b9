"""The rules between the keys of an experiment file: axes and values that exist, fair trials, times that compare."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

from koala.tables.parts import Exclude, Figure, Profile
from koala.tables.schema import refuse

if TYPE_CHECKING:
    from koala.tables.experiment import Experiment

FULL = "full"  # the profile of the paper's setting, which every file has
CLOCKS = ("epoch", "step", "seconds")
# The columns of metrics.jsonl, whatever is trained; only some runs have each of them.
HISTORY = (
    *(f"{split}_{name}" for split in ("test", "val", "train")
      for name in ("loss", "top1_error", "top5_error", "ppl", "ppl_by_batch")),
    "train_generator_loss", "fid", "feature_distance", "lr",
)  # fmt: skip
FILTERED = "filter_"  # begins the columns of what a filter estimates
# What every filter estimates, under one name: see koala.tables.figures.
INTERNALS = {
    "noise": "measurement noise R",
    "covariance": "covariance P of the weights",
    "gain": "gain, lr P / R",
}


def check(experiment: "Experiment") -> None:
    """Raises the error for the first rule that the experiment breaks."""
    _axes(experiment)
    _cells_named(experiment)
    _profiles(experiment)
    _times(experiment)
    _figures(experiment)
    _trials(experiment)


def _axes(experiment: "Experiment") -> None:
    names = list(experiment.axes)
    if sorted(experiment.rows + experiment.columns) != sorted(names):
        named = list(experiment.rows + experiment.columns)
        raise refuse("rows", f"and columns must name every axis once, not {named}", names)
    if experiment.compare not in names:
        raise refuse("compare", f"is {experiment.compare!r}", names)


def _cells_named(experiment: "Experiment") -> None:
    """Every rule names axes and values that there are, and what differs by an axis has all its values."""
    for key, rule in _rules(experiment):
        for axis, values in rule.match.items():
            if axis not in experiment.axes:
                raise refuse(f"{key}.match", f"names the axis {axis!r}", list(experiment.axes))
            for value in values:
                if value not in experiment.axes[axis].values:
                    raise refuse(f"{key}.match.{axis}", f"has no value {value!r}", list(experiment.axes[axis].values))
    for key, field in _by_axis(experiment):
        [(axis, values)] = field.items()
        if axis not in experiment.axes:
            raise refuse(key, f"names the axis {axis!r}", list(experiment.axes))
        if values.keys() != experiment.axes[axis].values.keys():
            raise refuse(f"{key}.{axis}", f"must have every value of the axis, not {values!r}",
                         list(experiment.axes[axis].values))  # fmt: skip


def _rules(experiment: "Experiment") -> list[tuple[str, Exclude]]:
    """Every rule with its key."""
    places: list[tuple[str, Any]] = [("", experiment)]
    places += [(f"profiles.{name}.", profile) for name, profile in experiment.profiles.items()]
    return [
        (f"{at}{field}.{index}", rule)
        for at, place in places
        for field in ("sources", "when", "exclude", "needs", "leaves_out")
        for index, rule in enumerate(getattr(place, field, ()))
    ]


def _by_axis(experiment: "Experiment") -> list[tuple[str, dict]]:
    """Everything that differs by the values of an axis, with its key."""
    places = [(f"metrics.{name}", metric) for name, metric in experiment.metrics.items()]
    for name, profile in experiment.profiles.items():
        places += [(f"profiles.{name}", profile)]
        places += [(f"profiles.{name}.metrics.{metric}", patch) for metric, patch in profile.metrics.items()]
    fields = ((f"{at}.{name}", getattr(part, name, None))
              for at, part in places for name in ("label", "key", "below", "trial_seeds"))  # fmt: skip
    return [(key, field) for key, field in fields if isinstance(field, dict)]


def _profiles(experiment: "Experiment") -> None:
    if FULL not in experiment.profiles:
        raise refuse("profiles", f"must have {FULL!r}", list(experiment.profiles))
    for name, profile in experiment.profiles.items():
        for metric in profile.metrics:
            if metric not in experiment.metrics:
                raise refuse(f"profiles.{name}.metrics", f"patches {metric!r}", list(experiment.metrics))
        most = len(profile.seeds)
        for count in _counts(profile):
            if not 1 <= count <= most:
                raise refuse(f"profiles.{name}.trial_seeds", f"is {count}", [f"1 ... {most}"])


def _counts(profile: Profile) -> list[int]:
    if isinstance(profile.trial_seeds, dict):
        return [count for counts in profile.trial_seeds.values() for count in counts.values()]
    return [] if profile.trial_seeds is None else [profile.trial_seeds]


def _times(experiment: "Experiment") -> None:
    """What is divided by another value's number, and what is a time, has runs that allow it."""
    for name, metric in experiment.metrics.items():
        compared = experiment.axes[experiment.compare].values
        if metric.relative is not None and metric.relative not in compared:
            raise refuse(f"metrics.{name}.relative", f"is {metric.relative!r}", list(compared))
    for profile in experiment.profiles.values():
        for name, metric in experiment.metrics_of(profile).items():
            runs = experiment.profiles.get(metric.profile or profile.name)
            if runs is None or runs is not profile and experiment.read_by(runs) != {runs.name}:
                others = [other for other in experiment.profiles if other != profile.name]
                raise refuse(f"profiles.{profile.name}.metrics.{name}.profile", f"is {metric.profile!r}", others)
            if metric.timed and not runs.timed:
                raise refuse("timed", f"must be true: metrics.{name} is a time, which needs runs one at a time")


def _figures(experiment: "Experiment") -> None:
    for name, figure in experiment.figures.items():
        x, y = _axes_of(experiment, figure)
        if figure.x not in x:
            raise refuse(f"figures.{name}.x", f"is {figure.x!r}", x or ["(no axis has numbers for values)"])
        if figure.y not in y and not (figure.kind == "curve" and figure.y.startswith(FILTERED)):
            raise refuse(f"figures.{name}.y", f"is {figure.y!r}", y)
        if figure.x == "seconds" and not experiment.profile(FULL).timed:
            raise refuse("timed", f"must be true: figures.{name} is over seconds")


def _axes_of(experiment: "Experiment", figure: Figure) -> tuple[list[str], list[str]]:
    """What a figure can have across and up."""
    if figure.kind == "curve":
        return list(CLOCKS), [*HISTORY, *INTERNALS, f"{FILTERED}R", f"{FILTERED}..."]
    numeric = [
        name for name, axis in experiment.axes.items() if all(type(value) in (int, float) for value in axis.values)
    ]
    return numeric, list(experiment.metrics)


def _trials(experiment: "Experiment") -> None:
    """Every compared value gets the same number of trials over one rate of its own, and validation chooses."""
    tuned = any(value.grid for axis in experiment.axes.values() for value in axis.values.values())
    if tuned and not experiment.choose:
        raise refuse("choose", "is missing: a grid needs the metric that chooses its best point, e.g. val_loss")
    if experiment.choose and not experiment.choose.startswith("val_"):
        raise refuse(
            "choose", f"is {experiment.choose!r}; only validation may choose", ["val_loss, val_top1_error, ..."]
        )
    rest = lambda cell: str(experiment.rest(cell.key))  # noqa: E731
    for profile in experiment.profiles.values() if tuned else ():
        cells = sorted((cell for cell in experiment.cells(profile) if cell.runs), key=rest)
        for _, group in groupby(cells, key=rest):
            trials = {cell.key[experiment.compare]: len(cell.settings) for cell in group}
            if len(set(trials.values())) > 1:
                reason = f"gives {experiment.compare} unequal numbers of trials: {trials}; they must be equal"
                raise refuse("axes", reason)
