"""Whether a run will have the numbers that a table reads, asked before it is started."""

from omegaconf import DictConfig

from koala.errors import ConfigError
from koala.records import Ended
from koala.tables.spec import Profile, Scalar, Spec
from koala.training.tasks import build_task


def metric_keys(cfg: DictConfig) -> list[str]:
    """The metrics that the history and the record of the run `cfg` will have."""
    if cfg.model.kind == "gan":
        distance = "fid" if cfg.model.features == "inception" else "feature_distance"
        return ["train_loss", "train_generator_loss", distance]
    task = build_task(cfg.data.kind, cfg.data.get("classes") or 2)
    names = task.summary([1.0] * (3 + len(task.errors)))  # count, sum, squares, errors
    if cfg.data.get("windows"):
        names["ppl_by_batch"] = 1.0
    splits = ["train", "test"] + ["val"] * bool(cfg.data.kind == "text" or cfg.data.get("validation"))
    return [f"{split}_{name}" for split in splits for name in names]


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
