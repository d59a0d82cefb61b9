"""Tasks: what a batch's losses and errors are. A task never waits for the device: it returns tensors for the loop.

A tally is float64 [3 + errors] on the device: how many losses, their sum, the sum of their squares, and how many errors
of each kind. The first three are what a filter measures (`LossStats`), and tallies of batches and of ranks add up.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koala.data.base import Batch
from koala.training.ranks import Ranks

IGNORED = -100  # a target that is not scored


def _tally(losses: Tensor, count: Tensor, *errors: Tensor) -> Tensor:
    losses = losses.detach().double()
    return torch.stack([count.double(), losses.sum(), losses.square().sum(), *(error.double() for error in errors)])


class Classification:
    """Images to classes: cross-entropy, top-1 and top-5 error in percent."""

    unit = "images"
    state = None  # images carry nothing from batch to batch

    def __init__(self, num_classes: int):
        self.top = min(5, num_classes)
        self.errors = ("top1_error", "top5_error") if num_classes > 5 else ("top1_error",)
        self.metrics = self.errors

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Per-sample losses [B] with gradient, and the tally without."""
        return self.score(self.outputs(model, batch), batch.targets)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C] with gradient, in float32 at least."""
        logits = model(batch.inputs)
        return logits if logits.dtype is torch.float64 else logits.float()

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `losses`, of logits [B, C] and classes [B]."""
        losses = F.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            misses = logits.topk(self.top).indices != targets[:, None]
            errors = [misses[:, 0].sum(), misses.all(1).sum()][: len(self.errors)]
            return losses, _tally(losses, losses.new_full((), len(losses)), *errors)

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch in `parts` pieces for gradient accumulation."""
        pieces = zip(batch.inputs.tensor_split(parts), batch.targets.tensor_split(parts), strict=True)
        return [Batch(inputs, targets) for inputs, targets in pieces if len(targets)]

    def summary(self, tally: list[float]) -> dict[str, float]:
        """Mean loss, and errors in percent, of a tally on the host."""
        count, total, _, *errors = tally
        return {"loss": total / count} | {
            name: 100 * wrong / count for name, wrong in zip(self.errors, errors, strict=True)
        }

    def state_dict(self, ranks: Ranks) -> dict:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict, ranks: Ranks) -> None:
        """Nothing to load."""


class LanguageModeling:
    """Next-token prediction with truncated back-propagation and carried state: cross-entropy per token, perplexity."""

    unit = "tokens"
    errors = ()
    metrics = ("ppl",)

    def __init__(self) -> None:
        self.state: tuple[Tensor, ...] | None = (
            None  # recurrent state of this rank's columns, [layers, columns, width] each
        )

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Per-token losses [tokens] with gradient, 0 where the target is not scored, and the tally without."""
        if batch.start:
            self.state = None
        logits, state = model(batch.inputs, self.state)
        self.state = tuple(part.detach() for part in state) if state is not None else None
        logits = logits.flatten(0, 1)
        logits = logits if logits.dtype is torch.float64 else logits.float()
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", ignore_index=IGNORED)
        return losses, _tally(losses, (batch.targets != IGNORED).sum())

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """The batch itself: its state belongs to whole columns, so the loop refuses parts > 1."""
        return [batch]

    def summary(self, tally: list[float]) -> dict[str, float]:
        """Mean loss in nats a token and perplexity, its exponential."""
        loss = tally[1] / tally[0]
        return {"loss": loss, "ppl": perplexity(loss)}

    def state_dict(self, ranks: Ranks) -> dict:
        """The recurrent state of all columns, whatever the number of ranks that hold them."""
        if self.state is None:
            return {}
        return {"state": tuple(ranks.gather_columns(part) for part in self.state)}

    def load_state_dict(self, state: dict, ranks: Ranks) -> None:
        """Takes this rank's columns of a saved state."""
        self.state = tuple(ranks.own_columns(part) for part in state["state"]) if state else None


def perplexity(loss: float) -> float:
    """exp(loss in nats a token); infinite where float64 has no such number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def build_task(kind: str, num_classes: int) -> Classification | LanguageModeling:
    """The task of a kind of data: images are classified, text is continued."""
    return Classification(num_classes) if kind == "images" else LanguageModeling()
