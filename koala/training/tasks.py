"""The tasks of this suite. A task never waits for the device: its tallies stay there until the loop reads them."""

import copy
import pkgutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from koala import metrics
from koala.data.base import Batch
from koala.training.optimizers import build_optimizer, check_needs
from koala.training.ranks import Ranks
from koala.training.tally import Tally

IGNORED = -100  # a target that is not scored


class Task:
    """What a kind of model brings to the loop: losses, optimizer, step, evaluation and metrics.

    Of a supervised one `losses(model, batch)` gives per-sample losses with gradient and their tally, and
    `split(batch, parts)` the pieces of a batch for gradient accumulation; others bring a step of their own.

    Attributes:
        unit: what a rate counts: images, sentences or tokens.
        counts: what a tally holds beside the losses.
        metrics: names of all metrics of its runs (koala/metrics.py).
        splits: of the data, those that it measures.
        state: what is carried from batch to batch; None: nothing.
    """

    unit: str
    counts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("loss",)
    splits: tuple[str, ...] = ("train", "val", "test")
    state: tuple[Tensor, ...] | None = None

    def check(self, cfg: DictConfig, world: int) -> None:
        """Raises ConfigError unless task and optimizer can be had as configured on `world` ranks."""
        check_needs(cfg, world)

    def build_optimizer(self, cfg: DictConfig, module: nn.Module) -> Optimizer:
        """The optimizer of all that is trained."""
        return build_optimizer(cfg.optim, cfg.wrapper, module)

    def build_step(self, cfg, ranks, arithmetic, module: nn.Module, net: nn.Module, optimizer: Optimizer) -> Callable:
        """A function of (batch, scored samples of the global batch, steps before) that steps and returns the tally.

        Args:
            net: what to call in training: `module` or its wrapper over ranks.
        """
        from koala.training.step import Step  # here: checking a configuration names tasks, and trains nothing

        return Step(cfg, ranks, arithmetic, self, module, net, optimizer)

    def build_evaluation(self, cfg, ranks, arithmetic, data, module, between_batches, folder: Path):
        """What measures a row of the history.

        Args:
            between_batches: called between two batches; may raise.
            folder: the run's, for files that an evaluation makes.
        """
        from koala.training.evaluation import Evaluation

        return Evaluation(cfg, ranks, arithmetic, data, module, self, between_batches)

    def summary(self, tally: Tally) -> dict[str, float]:
        """The metrics of a tally on the host: mean loss, and each count in percent of the samples."""
        count = tally.losses.count
        shares = {name: float(100 * tally[name] / count) for name in self.counts}
        return {"loss": float(tally.losses.mean)} | shares

    def without_state(self) -> "Task":
        """The same task at the beginning of other data."""
        task = copy.copy(self)
        task.state = None
        return task

    def state_dict(self, ranks: Ranks) -> dict:
        """The state of all columns of a batch, whatever the number of ranks that hold them (a collective)."""
        return {} if self.state is None else {"state": tuple(ranks.gather_columns(part) for part in self.state)}

    def load_state_dict(self, state: dict, ranks: Ranks) -> None:
        """Takes this rank's columns of a saved state."""
        self.state = tuple(ranks.local_columns(part) for part in state["state"]) if state else None


class Classification(Task):
    """Images or sentences to classes: cross-entropy, top-1 and top-5 error in percent."""

    def __init__(self, cfg: DictConfig, num_classes: int):
        self.unit, self.top = cfg.data.kind, min(5, num_classes)
        self.counts = ("top1_error", "top5_error") if num_classes > 5 else ("top1_error",)
        self.metrics = ("loss", *self.counts)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tally]:
        """Per-sample losses [B] with gradient, and their tally."""
        return self.score(self.outputs(model, batch), batch.targets)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C] with gradient, in float32 at least."""
        logits = model(batch.inputs)
        return logits if logits.dtype is torch.float64 else logits.float()

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tally]:
        """As `losses`, of logits [B, C] and classes [B]."""
        losses = F.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            wrong = logits.topk(self.top).indices != targets[:, None]
            errors = (wrong[:, 0].sum(), wrong.all(1).sum())
            return losses, Tally.of(losses, **dict(zip(self.counts, errors, strict=False)))

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch in `parts` pieces for gradient accumulation."""
        pieces = zip(batch.inputs.tensor_split(parts), batch.targets.tensor_split(parts), strict=True)
        return [Batch(inputs, targets) for inputs, targets in pieces if len(targets)]


class LanguageModeling(Task):
    """Next-token prediction with truncated back-propagation: cross-entropy per token, perplexity.

    Its state is the recurrent state of this rank's columns, [layers, columns, width] each.
    """

    unit = "tokens"

    def __init__(self, cfg: DictConfig, num_classes: int):
        self.metrics = ("loss", "ppl", *["ppl_by_batch"] * bool(cfg.data.get("windows")))

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tally]:
        """Per-token losses [tokens] with gradient, 0 where the target is not scored, and their tally."""
        if batch.start:
            self.state = None
        logits, state = model(batch.inputs, self.state)
        self.state = tuple(part.detach() for part in state) if state is not None else None
        logits = logits.flatten(0, 1)
        logits = logits if logits.dtype is torch.float64 else logits.float()
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", ignore_index=IGNORED)
        return losses, Tally.of(losses, (batch.targets != IGNORED).sum())

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch itself: its state belongs to whole columns, so the loop refuses parts > 1."""
        return [batch]

    def summary(self, tally: Tally) -> dict[str, float]:
        """Mean loss in nats a token and perplexity, its exponential."""
        summary = super().summary(tally)
        return summary | {"ppl": metrics.perplexity(summary["loss"])}


# By the kind of a model, imported when needed.
TASKS = {
    "vision": "koala.training.tasks:Classification",
    "text-classification": "koala.training.tasks:Classification",
    "language": "koala.training.tasks:LanguageModeling",
    "gan": "koala.extras.adversarial:Adversarial",
}


def build_task(cfg: DictConfig, num_classes: int | None = None) -> Task:
    """The task of a run.

    Args:
        num_classes: of the data's labels, or words of its vocabulary; default: what the configuration says.
    """
    return pkgutil.resolve_name(TASKS[cfg.model.kind])(cfg, num_classes or cfg.data.get("classes") or 2)


def metric_keys(cfg: DictConfig) -> list[str]:
    """The metrics that the history and the record of the run `cfg` will have."""
    task, validated = build_task(cfg), cfg.data.kind == "text" or cfg.data.get("validation")
    return metrics.columns(task.metrics, [split for split in task.splits if split != "val" or validated])
