"""The Hugging Face Trainer: it calls ``step()`` bare and zeroes gradients through the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from koala.optim import KalmanOptimizer


class KalmanCallback(TrainerCallback):
    """Passes the losses of the Trainer's model to a filter, and calls its `predict` before each step.

    Pass it to the Trainer twice: itself in ``callbacks`` and its :meth:`loss` as ``compute_loss_func``.

    Args:
        losses: maps the model's outputs and the labels to the losses of single samples or tokens, 1-D and without
            those whose label is -100.
    """

    def __init__(self, losses: Callable[[Any, Any], Tensor]) -> None:
        self.losses = losses
        self.optimizer: KalmanOptimizer | None = None  # until training begins
        self.accumulates = False

    def on_train_begin(self, args, state, control, *, optimizer: Optimizer, **kwargs) -> None:
        """Find the filter inside accelerate's wrapper.

        Raises:
            TypeError: the Trainer's optimizer is none of koala's.
        """
        while not isinstance(optimizer, KalmanOptimizer) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, KalmanOptimizer):
            raise TypeError(
                f"KalmanCallback needs an optimizer of koala's, the Trainer has a {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.accumulates = args.gradient_accumulation_steps > 1

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Drop the gradients and losses of a skipped step, and predict."""
        self.optimizer.zero_grad()
        self.optimizer.predict()

    def loss(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss that the Trainer differentiates: the sum of losses over the number of labels in the whole step.

        Raises:
            ValueError: gradients are accumulated over labels that the Trainer cannot count.
        """
        losses = self.losses(outputs, labels)
        mean = losses.mean() if self.optimizer is None else self.optimizer.observe(losses)
        if num_items_in_batch is not None:
            return losses.sum() / num_items_in_batch
        if self.accumulates and mean.requires_grad:
            raise ValueError(
                "the Trainer could not count the labels of the accumulated batches, so their mean is unknown: give "
                "them as one tensor under the key 'labels'"
            )
        return mean
