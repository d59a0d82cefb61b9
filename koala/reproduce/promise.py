"""Whether a run will have the numbers that a table reads, asked before it is started."""

from omegaconf import DictConfig

from koala.errors import ConfigError
from koala.records import Ended
from koala.runs.metrics import metric_keys
from koala.tables.metric import Scalar
from koala.tables.spec import Profile, Spec


def check_metrics(spec: Spec, profile: Profile, cell: dict[str, Scalar], cfg: DictConfig) -> None:
    """Refuses a run of the cell `cell` that lacks a metric of the table.

    Raises:
        ConfigError: naming the metric, its key and those there will be.
    """
    keys = metric_keys(cfg)
    for metric in (metric.of(cell) for metric in spec.metrics_of(profile)):
        if metric.key is not None and metric.key not in keys:
            raise ConfigError(
                f"metrics.{metric.name}.key={metric.key}: a run has no such metric; it has {', '.join(keys)}"
            )
        first = (metric.record or "step_ms").partition(".")[0]
        if first != "step_ms" and first not in Ended.__annotations__:
            known = ", ".join(Ended.__annotations__)
            raise ConfigError(f"metrics.{metric.name}.record={metric.record}: no {first!r} in a record; it has {known}")
    if spec.choose and spec.choose not in keys:
        raise ConfigError(f"choose={spec.choose}: the run has no such metric; it has {', '.join(keys)}")
