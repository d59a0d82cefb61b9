"""One number of a cell: where a run keeps it, and how it is shown."""

from dataclasses import dataclass, replace

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Metric:
    """One number of a cell and where a run keeps it. Either `key` or `record` is set.

    `key` names a metric of the history, taken `at` the last or the best epoch, or at the last evaluation not later than
    `after_seconds` of training; with `below`, the number is how far training had come (in `unit`) when the metric was
    first at or below that value. `record` is a dotted path into the record (`step_ms` is the median of a step), divided
    by the record's field `per` where given. The shown number is `offset + scale * value`. `relative` names a value of
    the compared axis: the number is then divided by that one's of the same seed, measured by the same command.
    `profile`: it is measured by the runs of this other profile. `by_cell` has fields that differ by the value of an
    axis: (field, axis, {value: ...}).
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
    relative: Scalar | None = None
    profile: str | None = None
    published: str | None = None
    published_std: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    better: str = "lower"
    digits: int = 2
    duration: bool = False
    by_cell: tuple[tuple[str, str, dict[Scalar, Scalar]], ...] = ()

    def of(self, key: dict[str, Scalar]) -> "Metric":
        """The metric as the cell `key` reads it."""
        return replace(self, **{name: values[key[axis]] for name, axis, values in self.by_cell}, by_cell=())

    @property
    def timed(self) -> bool:
        """Whether the number says how fast something was, which what else the machine did changes."""
        source = (self.record or "").partition(".")[0]
        clock = self.below is not None and self.unit == "seconds"
        return clock or self.after_seconds is not None or source in ("step_ms", "seconds", "throughput")
