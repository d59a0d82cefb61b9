"""Evaluates a row of a run's history; keeps the best values, the selected weights and the average of weights."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, update_bn

from koala.data.base import Batch, Data
from koala.metrics import COLUMNS, perplexity
from koala.training import parallel
from koala.training.machine import Arithmetic
from koala.training.ranks import Ranks
from koala.training.tally import Tally

if TYPE_CHECKING:
    from koala.training.tasks import Task

BATCH_NORM_BATCHES = 50  # that BatchNorm's statistics are computed from at averaged weights


class Diverged(Exception):
    """A loss or a weight is no longer finite."""


class Evaluation:
    """What is evaluated at the end of an epoch, and what of it a run's record keeps.

    Args:
        between_batches: called between two batches; may raise (the run is to stop).
    """

    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        arithmetic: Arithmetic,
        data: Data,
        module: nn.Module,
        task: "Task",
        between_batches: Callable[[], None],
    ):
        self.cfg, self.ranks, self.arithmetic, self.data, self.module = cfg, ranks, arithmetic, data, module
        self.task, self.between_batches = task, between_batches
        self.evaluated = module  # what the last row is of: the module, or the average of its weights
        self.image: Path | None = None  # that the last row came with
        self.best_val, self.best_epoch = math.inf, None
        self.best: dict[str, dict] = {}  # column -> {"value", "epoch"}, the best over the rows
        self.selected: dict[str, Tensor] | None = None  # weights of the best validation, for select=best-val
        self.average = WeightAverage(module, cfg) if cfg.wrapper.name == "swa" else None

    def measure(self, row: dict) -> dict:
        """`row` with the metrics of the splits that may be looked at now.

        Raises:
            Diverged: a loss of any split is not finite, or a weight.
        """
        _require_finite_losses(row)
        finite = torch.stack([parallel.local(weight).isfinite().all() for weight in self.module.parameters()]).all()
        if int(self.ranks.sum((~finite).float())):
            raise Diverged(f"weights are no longer finite at step {row['step']}")
        row |= self.metrics(row)
        _require_finite_losses(row)
        return row

    @contextlib.contextmanager
    def at_average(self, optimizer: Optimizer) -> Iterator[None]:
        """Switches to the weights that `optimizer` is evaluated at, if it trains at others (schedule-free).

        BatchNorm's statistics are computed there, as its authors advise; the former ones come back with the weights.
        """
        if not hasattr(optimizer, "eval"):
            yield
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        optimizer.eval()
        batches = itertools.islice(self.data.train.epoch(0), BATCH_NORM_BATCHES)
        with self.arithmetic.autocast():
            update_bn((self.arithmetic.cast(batch).inputs for batch in self._checked(batches)), self.module)
        yield
        optimizer.train()
        for buffer, before in buffers:
            buffer.copy_(before)

    def metrics(self, row: dict) -> dict[str, float]:
        """Metrics of the present weights on the splits that may be looked at now."""
        values, self.evaluated = {}, self._evaluated_model(int(row["epoch"]))
        for split, source in self.data.evaluation.items():
            if split == "val" or self.cfg.select == "last":  # a test set that is selected on validation is seen once
                values |= {f"{split}_{name}": value for name, value in self.evaluate(self.evaluated, source).items()}
        return values

    def keep_best(self, row: dict) -> None:
        """Keeps the best values so far, and the weights of the best validation."""
        if self.cfg.select == "best-val" and row["val_loss"] < self.best_val:
            self.best_val, self.best_epoch = row["val_loss"], row["epoch"]
            self.selected = parallel.cpu_copy(self.evaluated.state_dict())
        for name, value in row.items():
            if name not in COLUMNS or not math.isfinite(value):
                continue
            if name not in self.best or value < self.best[name]["value"]:
                self.best[name] = {"value": value, "epoch": row["epoch"]}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, source: Iterable[Batch]) -> dict[str, float]:
        """Metrics of `model` over every sample of `source`, once over all ranks."""
        task = self.task.without_state()
        tally = Tally.zero(task.counts, self.ranks.device)
        model.eval()
        with self.arithmetic.autocast():
            for batch in self._checked(source):
                tally = tally + task.losses(model, self.arithmetic.cast(batch))[1]
        model.train()
        values = task.summary(tally.over(self.ranks).on_host())
        if slots := getattr(source, "slots", None):
            # The older logs' perplexity: a mean over batches that takes an incomplete last one as full, so it is lower
            values["ppl_by_batch"] = perplexity(values["loss"] * source.count / slots)
        return values

    def test_selected(self) -> dict:
        """For select=best-val: test metrics of the best-validation weights, and the epoch they are from."""
        self.module.load_state_dict(parallel.sharded_for(self.selected, self.module))
        values = self.evaluate(self.module, self.data.evaluation["test"])
        return {f"test_{name}": value for name, value in values.items()} | {"selected_epoch": self.best_epoch}

    def _checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.between_batches()
            yield batch

    def _evaluated_model(self, epoch: int) -> nn.Module:
        model = self.module
        if self.average is not None:
            batches = self._checked(self.data.train.epoch(epoch))
            inputs = (self.arithmetic.cast(batch).inputs for batch in batches)
            with self.arithmetic.autocast():
                model = self.average.evaluated(model, inputs)
        elif not parallel.is_sharded(model):
            self.ranks.check_replicas(model)
        self.ranks.broadcast_buffers(model)
        return model

    # State

    def state_dict(self) -> dict:
        """What is kept from row to row."""
        return {
            "best_val": self.best_val,
            "best_epoch": self.best_epoch,
            "best": self.best,
            "average": self.average.average.state_dict() if self.average else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.best_val, self.best_epoch = state["best_val"], state["best_epoch"]
        self.best = dict(state["best"])
        if self.average:
            self.average.average.load_state_dict(state["average"])


def _require_finite_losses(row: dict) -> None:
    for name, value in row.items():
        if name.endswith("_loss") and not math.isfinite(value):
            raise Diverged(f"{name} is {value} at step {row['step']}")


class WeightAverage:
    """SWA: an equal average of the weights after some epochs, used for evaluation once it holds any.

    Args:
        module: the module being trained (not a DDP wrapper).
        cfg: `wrapper.start`, the part of the run from which on weights are averaged, and `wrapper.every`, the epochs
            between two additions.
    """

    def __init__(self, module: nn.Module, cfg: DictConfig):
        self.average = AveragedModel(module)
        self.start, self.every = round(cfg.wrapper.start * cfg.epochs), cfg.wrapper.every

    def after_epoch(self, module: nn.Module, epoch: int) -> None:
        """Adds the weights if `epoch` (counted from 1) is one to average."""
        if epoch >= self.start and (epoch - self.start) % self.every == 0:
            self.average.update_parameters(module)

    def evaluated(self, module: nn.Module, inputs: Iterable[Tensor]) -> nn.Module:
        """What to evaluate: the average with BatchNorm statistics of `inputs`, or `module` before it began."""
        if int(self.average.n_averaged) == 0:
            return module
        averaged = copy.deepcopy(self.average.module)  # the average itself does not keep this epoch's statistics
        update_bn(inputs, averaged)
        return averaged
