"""Which metrics a run will have, before it is started, and when they reached a target, after it."""

from collections.abc import Iterable

from omegaconf import DictConfig

from koala.training.tasks import build_task


def metric_keys(cfg: DictConfig) -> list[str]:
    """The metrics that the history and the record of the run `cfg` will have."""
    splits = ["train", "test"] + ["val"] * bool(cfg.data.kind == "text" or cfg.data.get("validation"))
    return build_task(cfg, cfg.data.get("classes") or 2).columns(splits)


def reached(rows: Iterable[dict], targets: dict[str, float] | None) -> dict[str, dict | None]:
    """Where each of `targets` ({metric: value}) was first reached, if it was: {target, epoch, step, seconds}."""
    first: dict[str, dict | None] = dict.fromkeys(targets or {})
    for row in rows:
        for name, target in (targets or {}).items():
            if first[name] is None and row.get(name) is not None and row[name] <= target:
                first[name] = {"target": target, **{key: row[key] for key in ("epoch", "step", "seconds")}}
    return first
