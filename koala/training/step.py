"""One batch, one optimizer step."""

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from koala.data.base import Batch, generator
from koala.errors import ConfigError
from koala.training import machine, parallel
from koala.training.machine import Arithmetic
from koala.training.optimizers import filter_of, needs_of
from koala.training.ranks import Ranks
from koala.training.tally import Tally

if TYPE_CHECKING:
    from koala.training.tasks import Task


class Step:
    """An optimizer step on this rank's part of a global batch. Nothing in it waits for the device.

    Args:
        module: the model; `net` is what to call in training, the same or its wrapper over ranks.
    """

    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        arithmetic: Arithmetic,
        task: "Task",
        module: nn.Module,
        net: nn.Module,
        optimizer: Optimizer,
    ):
        self.cfg, self.ranks, self.arithmetic, self.task = cfg, ranks, arithmetic, task
        self.module, self.net, self.optimizer = module, net, optimizer
        self.parameters = [weight for weight in module.parameters() if weight.requires_grad]
        self.needs, self.filtered = needs_of(cfg.optim), filter_of(optimizer) is not None
        self.penalised = hasattr(module, "penalty")

    def __call__(self, batch: Batch, count: int, step: int) -> Tally:
        """Steps, and returns the tally of this rank's batch at the weights before.

        Args:
            count: scored samples (or tokens) of the global batch.
            step: steps done before.

        Raises:
            ConfigError: out of memory; the message has what fits.
        """
        batch = self.arithmetic.cast(batch)
        seed_all(self.ranks.device, self.cfg.seed, "step", step, self.ranks.rank)
        self.net.train()
        try:
            return self._step(batch, count, step)
        except RuntimeError as error:
            if not machine.is_exhausted(error):
                raise
        # Only here, with the error gone, is what the failed step held free for the search.
        raise self._out_of_memory(batch)

    def _step(self, batch: Batch, count: int, step: int) -> Tally:
        if self.needs.outputs:
            return self._observed(batch)
        pieces = self.task.split(batch, self.cfg.accumulation)
        scale = self.ranks.world / count  # DDP averages over ranks, so this makes the gradient that of the global mean
        tallies, state = [], self.task.state

        @torch.enable_grad()  # some libraries call it without
        def closure():
            self.task.state = state
            self.optimizer.zero_grad(set_to_none=True)
            passes = [self._backward(piece, scale, last=piece is pieces[-1]) for piece in pieces]
            tally = functools.reduce(operator.add, passes)
            if self.cfg.grad_clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.cfg.grad_clip)
            tallies.append(tally)
            # What an optimizer draws (Hutchinson's signs, a power iteration), ranks share.
            seed_all(self.ranks.device, self.cfg.seed, "update", step)
            if self.filtered:
                return tally.losses
            return (tally.over(self.ranks) if self.needs.global_loss else tally).losses.mean

        with self._scaled_learning_rate(batch):
            self.optimizer.step(closure)
        if self.needs.create_graph:
            self.optimizer.zero_grad(set_to_none=True)  # frees the graph that the gradients hold
        return tallies[0]  # L-BFGS calls the closure again at other weights

    def _observed(self, batch: Batch) -> Tally:
        """The step of an optimizer that differentiates the outputs itself."""
        tallies = []

        def closure() -> tuple[Tensor, Tensor]:
            with self.arithmetic.autocast():
                outputs = self.task.outputs(self.net, batch)
            tallies.append(self.task.score(outputs.detach(), batch.targets)[1])
            return outputs, batch.targets

        self.optimizer.step(closure)
        return tallies[0]

    def _backward(self, piece: Batch, scale: float, last: bool) -> Tally:
        """Forward and backward pass of one piece; its tally. Ranks reduce gradients in the last piece only."""
        kernels = sdpa_kernel(SDPBackend.MATH) if self.needs.create_graph else contextlib.nullcontext()
        with parallel.gradient_sync(self.net, last):
            with self.arithmetic.autocast(), kernels:  # fused attention has no second derivative
                losses, tally = self.task.losses(self.net, piece)
            loss = losses.sum() * scale
            if self.penalised:  # a model's own, such as AWD-LSTM's on activations: differentiated, not reported
                loss = loss + self.module.penalty / self.cfg.accumulation
            loss.backward(create_graph=self.needs.create_graph)
        return tally

    @contextlib.contextmanager
    def _scaled_learning_rate(self, batch: Batch) -> Iterator[None]:
        """With random lengths (data.bptt_random), the rate in proportion to this batch's (Merity et al., 2018)."""
        if not self.cfg.data.get("bptt_random", False):
            yield
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (batch.inputs.shape[1] / self.cfg.data.bptt)
        yield
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _out_of_memory(self, batch: Batch) -> ConfigError:
        """What to change when a step did not fit: found by trying, without other ranks or a step."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.needs.outputs:
            reason = (
                f"out of memory: optim={self.cfg.optim.name} holds a row of every weight for each output and sample"
            )
            return ConfigError("batch_size", self.cfg.batch_size, reason, valid="a smaller batch_size")

        def attempt(samples: int) -> None:
            for _ in range(2):  # the second pass holds the first one's gradients
                with self.arithmetic.autocast():
                    losses, _ = self.task.losses(self.module, Batch(batch.inputs[:samples], batch.targets[:samples]))
                losses.sum().backward(create_graph=self.needs.create_graph)
            self.optimizer.zero_grad(set_to_none=True)

        tried = -(-len(batch.inputs) // self.cfg.accumulation)
        fits = None if parallel.is_sharded(self.module) else machine.largest_fitting(attempt, tried)
        reason = f"out of memory with {tried} {self.task.unit} a pass on each rank"
        if fits is None:
            valid = "a smaller model, precision=bf16 or more ranks; no smaller batch fits either"
        elif self.task.unit == "tokens":
            valid = f"batch_size={fits * self.ranks.world} or less, or more ranks: {fits} columns fit"
        else:
            steps = "the same steps"
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.module.modules()):
                steps = "other steps: BatchNorm then normalises over the images of a pass"
            valid = f"accumulation={-(-len(batch.inputs) // fits)}, which takes {steps}: {fits} fit"
        return ConfigError("batch_size", self.cfg.batch_size, reason, valid=valid)


def seed_all(device: torch.device, *key: int | str) -> None:
    """Seeds what `device` draws from, by a function of `key` alone, so that a resumed run draws the same.

    torch.manual_seed would do, but notes a call stack for every kind of device that is not there: 0.1 ms a step.
    """
    seed = generator(*key).initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
