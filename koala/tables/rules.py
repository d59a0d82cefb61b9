"""The rules between the keys of an experiment file: axes and values that exist, fair trials, times that compare."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from koala.errors import ConfigError
from koala.metrics import COLUMNS
from koala.tables.parts import Figure

if TYPE_CHECKING:
    from koala.tables.experiment import Experiment

FULL = "full"  # the profile of the paper's setting, which every file has
CLOCKS = ("epoch", "step", "seconds")
# What every filter estimates, under one name: see koala.tables.choose.quantity.
INTERNALS = {
    "noise": "measurement noise R",
    "covariance": "covariance P of the weights",
    "rate": "SGD's learning rate for the same step, lr P L / R",
}
HISTORY = (*COLUMNS, "lr", *INTERNALS)  # of metrics.jsonl, whatever is trained; only some runs have each of them
FILTERED = "filter_"  # begins the columns of what one filter estimates


def check(experiment: "Experiment") -> None:
    """Raises ConfigError for the first rule that the experiment breaks."""
    for rules in (_names, _profiles, _times, _figures, _trials):
        rules(experiment)


def _one_of(key: str, value: Any, valid: Any) -> None:
    if value not in valid:
        raise ConfigError(key, value, "is none of what there is", valid=valid or "nothing here")


def _names(experiment: "Experiment") -> None:
    """Whatever names an axis or a value names one that there is, and what differs by an axis has all its values."""
    axes, named = experiment.axes, experiment.rows + experiment.columns
    if sorted(named) != sorted(axes):
        raise ConfigError("rows", list(named), "with columns must name every axis once", valid=axes)
    _one_of("compare", experiment.compare, axes)
    for key, part in _parts(experiment):
        for axis, values in getattr(part, "match", {}).items():
            _one_of(f"{key}.match", axis, axes)
            for value in values:
                _one_of(f"{key}.match.{axis}", value, list(axes[axis].values))
        for field in ("label", "key", "below", "trial_seeds"):
            if isinstance(by := getattr(part, field, None), dict):
                [(axis, values)] = by.items()
                _one_of(f"{key}.{field}", axis, axes)
                if values.keys() != axes[axis].values.keys():
                    raise ConfigError(f"{key}.{field}.{axis}", values, "must have every value of the axis",
                                      valid=axes[axis].values)  # fmt: skip


def _parts(experiment: "Experiment") -> Iterator[tuple[str, Any]]:
    """Every rule, metric and profile, with its key."""
    yield from ((f"metrics.{name}", metric) for name, metric in experiment.metrics.items())
    places: list[tuple[str, Any]] = [("", experiment)]
    for name, profile in experiment.profiles.items():
        places.append((f"profiles.{name}.", profile))
        yield f"profiles.{name}", profile
        yield from ((f"profiles.{name}.metrics.{metric}", patch) for metric, patch in profile.metrics.items())
    for at, place in places:
        for field in ("sources", "when", "exclude", "needs", "leaves_out"):
            yield from ((f"{at}{field}.{index}", rule) for index, rule in enumerate(getattr(place, field, ())))


def _profiles(experiment: "Experiment") -> None:
    if FULL not in experiment.profiles:
        raise ConfigError("profiles", list(experiment.profiles), f"must have {FULL!r}")
    for name, profile in experiment.profiles.items():
        for metric in profile.metrics:
            _one_of(f"profiles.{name}.metrics", metric, experiment.metrics)
        seeds, most = profile.trial_seeds, len(profile.seeds)
        counts = [count for by in seeds.values() for count in by.values()] if isinstance(seeds, dict) else [seeds]
        for count in counts:
            if count is not None and not 1 <= count <= most:
                raise ConfigError(f"profiles.{name}.trial_seeds", count, "is out of range", valid=f"1 to {most}")


def _times(experiment: "Experiment") -> None:
    """What is divided by another value's number, and what is a time, has runs that allow it."""
    for name, metric in experiment.metrics.items():
        if metric.relative is not None:
            _one_of(f"metrics.{name}.relative", metric.relative, list(experiment.axes[experiment.compare].values))
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


def _figures(experiment: "Experiment") -> None:
    for name, figure in experiment.figures.items():
        x, y = _axes_of(experiment, figure)
        _one_of(f"figures.{name}.x", figure.x, x)
        if not (figure.kind == "curve" and figure.y.startswith(FILTERED)):
            _one_of(f"figures.{name}.y", figure.y, y)
        if figure.x == "seconds" and not experiment.profile(FULL).timed:
            raise ConfigError("timed", False, f"figures.{name} is over seconds", valid="true")


def _axes_of(experiment: "Experiment", figure: Figure) -> tuple[list[str], list[str]]:
    """What a figure can have across and up."""
    if figure.kind == "curve":
        return list(CLOCKS), [*HISTORY, f"{FILTERED}R", f"{FILTERED}..."]
    numbers = lambda axis: all(type(value) in (int, float) for value in axis.values)  # noqa: E731
    return [name for name, axis in experiment.axes.items() if numbers(axis)], list(experiment.metrics)


def _trials(experiment: "Experiment") -> None:
    """Every compared value gets the same number of trials over one rate of its own, and validation chooses."""
    tuned = any(value.grid for axis in experiment.axes.values() for value in axis.values.values())
    if tuned and not experiment.choose or experiment.choose and not experiment.choose.startswith("val_"):
        reason = "a grid needs the validation metric that chooses its best point"
        raise ConfigError("choose", experiment.choose, reason, valid="val_loss, val_top1_error, ...")
    rest = lambda cell: str(experiment.rest(cell.key))  # noqa: E731
    for profile in experiment.profiles.values() if tuned else ():
        cells = sorted((cell for cell in experiment.cells(profile) if cell.runs), key=rest)
        for _, group in groupby(cells, key=rest):
            trials = {cell.key[experiment.compare]: len(cell.settings) for cell in group}
            if len(set(trials.values())) > 1:
                raise ConfigError("axes", trials, f"gives {experiment.compare} unequal numbers of trials")
