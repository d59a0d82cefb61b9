"""The metrics of a run, each described once: what it is called, how it reads, and the splits that it is measured on.

A row of the history has a metric as `<split>_<name>`, such as `val_top1_error`; one that belongs to no split, as `fid`,
has its name alone. This module needs no torch, so that a table can be rendered without torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

SPLITS = {"train": "training", "val": "validation", "test": "test"}  # in names of columns, and in words


@dataclass(frozen=True)
class Metric:
    """One metric; lower is better.

    Args:
        name: in a task's summary; the end of its columns' names.
        label: in words, with the unit.
        splits: what it is measured on; none: it belongs to the model, not to a split.
        printed: whether the line of an evaluation has it.
    """

    name: str
    label: str
    splits: tuple[str, ...] = tuple(SPLITS)
    printed: bool = True

    def columns(self, splits: Iterable[str] = SPLITS) -> dict[str, str]:
        """Its columns of a history with these splits, and their labels: `{"test_ppl": "test perplexity"}`."""
        if not self.splits:
            return {self.name: self.label}
        return {f"{split}_{self.name}": f"{SPLITS[split]} {self.label}" for split in splits if split in self.splits}


METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", "loss"),
        Metric("top1_error", "top-1 error (%)"),
        Metric("top5_error", "top-5 error (%)", printed=False),
        Metric("ppl", "perplexity"),
        Metric("ppl_by_batch", "perplexity as a mean over batches", splits=("val", "test"), printed=False),
        Metric("generator_loss", "generator's loss", splits=("train",)),
        Metric("fid", "FID", splits=()),
        Metric("feature_distance", "feature distance", splits=()),
    )
}
LABELS = {column: label for metric in METRICS.values() for column, label in metric.columns().items()}
COLUMNS = {column: metric for metric in METRICS.values() for column in metric.columns()}  # all that a history can have


def columns(names: Iterable[str], splits: Iterable[str]) -> list[str]:
    """The columns of the metrics `names` in the history of a run that has these splits."""
    return [column for name in names for column in METRICS[name].columns(splits)]


def perplexity(loss: float) -> float:
    """exp(loss in nats a token); infinite where float64 has no such number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def reached(rows: Iterable[dict], targets: dict[str, float] | None) -> dict[str, dict | None]:
    """Where each of `targets` ({metric: value}) was first reached, if it was: {target, epoch, step, seconds}."""
    first: dict[str, dict | None] = dict.fromkeys(targets or {})
    for row in rows:
        for name, target in (targets or {}).items():
            if first[name] is None and row.get(name) is not None and row[name] <= target:
                first[name] = {"target": target, **{key: row[key] for key in ("epoch", "step", "seconds")}}
    return first
