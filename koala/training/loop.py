"""The training loop: steps, epochs, evaluations, checkpoints. It reads device values only every `log_every` steps."""

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from koala import data as datasets
from koala import models, records
from koala.data.base import Batch, generator
from koala.errors import ConfigError
from koala.optim import LossStats
from koala.training import checkpoint, memory, replicas
from koala.training.folder import RunFolder, Stopwatch
from koala.training.optimizers import WeightAverage, build_optimizer, build_schedule, learning_rate
from koala.training.ranks import Ranks
from koala.training.signals import Stopped, StopSignals
from koala.training.tasks import build_task
from koala.training.whereabouts import Whereabouts

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


class Diverged(Exception):
    """The training loss is no longer finite."""


@dataclass
class Position:
    """Where a run is: `epoch` epochs done and `index` steps of the next, `step` steps in all; the best so far."""

    epoch: int = 0
    index: int = 0
    step: int = 0
    rows: int = 0
    measured: int = -1  # step of the last row
    best_val: float = math.inf
    best_epoch: float | None = None
    best: dict = field(default_factory=dict)  # metric -> {"value", "epoch"}, the lowest over the rows
    targets: dict = field(default_factory=dict)  # metric -> where its target was first reached


class Trainer:
    """One run on this rank, from its configuration to its last row.

    Raises:
        ConfigError: data, model and batch size do not fit each other.
    """

    def __init__(self, cfg: DictConfig, ranks: Ranks, folder: RunFolder, monitor):
        self.cfg, self.ranks, self.folder, self.monitor = cfg, ranks, folder, monitor
        if cfg.batch_size < ranks.world * cfg.accumulation:
            raise ConfigError(
                f"batch_size={cfg.batch_size}: must be at least ranks x accumulation = {ranks.world * cfg.accumulation}"
            )
        self.data = datasets.build(
            cfg.data,
            seed=cfg.seed,
            batch_size=cfg.batch_size,
            eval_batch_size=cfg.eval_batch_size,
            rank=ranks.rank,
            world=ranks.world,
            device=ranks.device,
            data_root=cfg.data_root,
        )
        if cfg.select == "best-val" and "val" not in self.data.evaluation:
            raise ConfigError(
                f"select=best-val: data={cfg.data.name} has no validation split here; valid: last, or carve "
                "one (data.validation=N)"
            )
        self.task = build_task(self.data.kind, self.data.num_classes)
        if self.data.kind == "text" and cfg.accumulation > 1:
            raise ConfigError(
                f"accumulation={cfg.accumulation}: language models carry state from batch to batch; use 1"
            )
        torch.manual_seed(generator(cfg.seed, "weights").initial_seed())
        module = models.build(
            cfg.model,
            kind=self.data.kind,
            num_classes=self.data.num_classes,
            input_shape=self.data.input_shape,
        )
        flat = cfg.optim.get("contiguous", False) or (cfg.strategy == "fsdp" and ranks.world > 1)  # FSDP takes no other
        last = cfg.channels_last and self.data.kind == "images" and not flat
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.module = module.to(ranks.device, DTYPES[cfg.precision], memory_format=self.memory_format)
        if cfg.compile:
            self.module.compile()  # in place: names of parameters stay as they are
        if cfg.wrapper.name != "none" and cfg.strategy == "fsdp":
            raise ConfigError(f"wrapper={cfg.wrapper.name} averages whole weights: use strategy=ddp")
        self.net = replicas.distribute(self.module, ranks, cfg.strategy)
        self.optimizer = build_optimizer(cfg.optim, cfg.wrapper, self.module)
        base = getattr(self.optimizer, "optimizer", self.optimizer)  # inside Lookahead
        self.filter = base if hasattr(base, "diagnostics") else None
        self.steps_per_epoch = self.data.train.steps_per_epoch
        self.schedule, self.schedule_by = build_schedule(cfg.schedule, self.optimizer, cfg.epochs, self.steps_per_epoch)
        if self.schedule_by == "plateau" and "val" not in self.data.evaluation:
            raise ConfigError(
                f"schedule=plateau: data={cfg.data.name} has no validation split; valid: step, cosine, constant"
            )
        self.average = None
        if cfg.wrapper.name == "swa":
            self.average = WeightAverage(self.module, round(cfg.wrapper.start * cfg.epochs), cfg.wrapper.every)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.position = Position()
        self.selected: dict[str, Tensor] | None = None  # weights of the best validation, for select=best-val
        self.sums = self._zero_sums()
        self.train_clock, self.eval_clock = Stopwatch(), Stopwatch()
        self.saved_at = time.perf_counter()

    def _zero_sums(self) -> Tensor:
        """Sums of the task's metrics and their count, [names + 1] float64 on the device."""
        return torch.zeros(len(self.task.names) + 1, dtype=torch.float64, device=self.ranks.device)

    def _placed(self, batch: Batch) -> Batch:
        """Images in the model's dtype and memory layout; tokens as they are."""
        if self.data.kind == "images":
            return batch._replace(
                inputs=batch.inputs.to(dtype=DTYPES[self.cfg.precision], memory_format=self.memory_format)
            )
        return batch

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    # Training

    def fit(self) -> None:
        """Trains to the end of the configuration, from wherever `position` is.

        Raises:
            Diverged: a look at the loss found it not finite.
            Stopped: a signal asked to; a checkpoint was written.
        """
        position = self.position
        with StopSignals() as self.signals, Whereabouts(self.ranks, self.cfg.timeout):
            self.train_clock.start()
            while not (self._at_end and position.measured == position.step):
                if not self._at_end:  # a run can be stopped between its last step and the evaluation after it
                    self._rest_of_epoch()
                self._end_of_epoch()
            self.train_clock.stop()

    @property
    def _at_end(self) -> bool:
        out_of_steps = self.cfg.max_steps is not None and self.position.step >= self.cfg.max_steps
        return out_of_steps or self.position.epoch >= self.cfg.epochs

    def _rest_of_epoch(self) -> None:
        position = self.position
        for batch in self.data.train.epoch(position.epoch, position.index):
            self.train_step(self._placed(batch), self.data.train.samples(position.index))
            position.index, position.step = position.index + 1, position.step + 1
            self._between_steps()
            if self._at_end:
                return

    def train_step(self, batch: Batch, count: int) -> None:
        """One optimizer step on this rank's part of a global batch of `count` scored samples (or tokens)."""
        cfg = self.cfg
        # Dropout is a function of (seed, step, rank): a resumed run draws what an undisturbed one would have.
        torch.manual_seed(generator(cfg.seed, "step", self.position.step, self.ranks.rank).initial_seed())
        pieces = self.task.split(batch, cfg.accumulation)
        scale = self.ranks.world / count  # DDP averages over ranks, so this makes the gradient that of the global mean
        create_graph = cfg.optim.get("create_graph", False)
        measured, carried = [], self.task.state

        def closure():
            self.task.state = carried
            self.optimizer.zero_grad(set_to_none=True)
            stats, sums = None, 0
            for number, piece in enumerate(pieces):
                with self._synchronised(number == len(pieces) - 1):
                    with self._autocast():
                        losses, piece_sums = self.task.losses(self.net, piece)
                    (losses.sum() * scale).backward(create_graph=create_graph)
                piece_stats = LossStats.from_losses(losses)
                stats = piece_stats if stats is None else stats + piece_stats
                sums = sums + piece_sums
            if cfg.grad_clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, cfg.grad_clip)
            measured.append(sums)
            return stats if self.filter is not None else stats.mean

        self.net.train()
        try:
            self.optimizer.step(closure)
        except RuntimeError as error:
            if memory.is_exhausted(error):
                raise ConfigError(self._memory_advice(batch)) from error
            raise
        self.sums += measured[0]  # L-BFGS calls the closure again at other weights
        if create_graph:
            self.optimizer.zero_grad(set_to_none=True)  # frees the graph that the gradients hold
        if self.schedule_by == "step":
            self.schedule.step()

    def _synchronised(self, last: bool):
        """Gradients are reduced over ranks in the last accumulation step only."""
        if isinstance(self.net, DistributedDataParallel) and not last:
            return self.net.no_sync()
        if replicas.is_sharded(self.module):
            self.net.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _memory_advice(self, batch: Batch) -> str:
        """What to change when a step did not fit: found by trying, without other ranks or a step."""
        self.optimizer.zero_grad(set_to_none=True)

        def attempt(samples: int) -> None:
            with self._autocast():
                losses, _ = self.task.losses(self.module, Batch(batch.inputs[:samples], batch.targets[:samples]))
            losses.sum().backward()
            self.optimizer.zero_grad(set_to_none=True)

        tried = -(-len(batch.inputs) // self.cfg.accumulation)
        fits = None if replicas.is_sharded(self.module) else memory.largest_fitting(attempt, tried)
        message = f"batch_size={self.cfg.batch_size}: out of memory with {tried} {self.task.unit} a pass on each rank; "
        if fits is None:
            return message + "nothing smaller was found to fit: use a smaller model, precision=bf16 or more ranks"
        if self.data.kind == "text":
            return message + f"{fits} columns fit: use batch_size={fits * self.ranks.world} or less, or more ranks"
        parts = -(-len(batch.inputs) // fits)
        return message + f"{fits} fit: use accumulation={parts}, which takes the same steps"

    def _between_steps(self) -> None:
        """Every `log_every` steps: is the loss finite, is a checkpoint due, was a stop asked for? All ranks agree.

        One rank alone looks at its clock and its signals after every step; that costs no wait for the device.
        """
        look = self.position.step % self.cfg.log_every == 0
        if not look and self.ranks.world > 1:
            return
        asked = self.signals.received is not None
        due = self._checkpoint_due()
        if look:
            state = torch.cat([self.sums, self.sums.new_tensor([float(asked), float(due)])])
            *sums, asked, due = self.ranks.sum(state).tolist()
            summary = self.task.summary(sums)
            if not math.isfinite(summary["loss"]):
                raise Diverged(f"the training loss is {summary['loss']} at step {self.position.step}")
            self.monitor.step(self.position.step, summary["loss"], learning_rate(self.optimizer))
        if asked or due:
            self.save()
        if asked:
            self.train_clock.stop()
            raise Stopped(self.ranks.largest(self.signals.received or 0))

    def _end_of_epoch(self) -> None:
        """Closes an epoch (or what max_steps left of it): schedule, averages, evaluation."""
        cfg, position = self.cfg, self.position
        whole = position.index >= self.steps_per_epoch
        done = position.epoch + position.index / self.steps_per_epoch
        if whole:
            position.epoch, position.index = position.epoch + 1, 0
            if self.schedule_by == "epoch":
                self.schedule.step()
            if self.average is not None:
                self.average.after_epoch(self.module, position.epoch)
        if self._at_end or position.epoch % cfg.eval_every == 0:
            self.train_clock.stop()
            self._measure(done)
            self.train_clock.start()
            self.sums = self._zero_sums()
        due = self.sums.new_tensor(float(self._checkpoint_due()))
        if self._at_end or self.ranks.sum(due).item() > 0:
            self.save()

    def _checkpoint_due(self) -> bool:
        return self.ranks.is_main and time.perf_counter() - self.saved_at >= self.cfg.checkpoint_every

    # Evaluation

    def _measure(self, epoch: float) -> None:
        """Evaluates, and writes the row of this point of the run."""
        cfg, position = self.cfg, self.position
        sums = self.ranks.sum(self.sums.clone()).tolist()
        row = {
            "epoch": round(epoch, 6),
            "step": position.step,
            "seconds": self.train_clock.seconds,
            "lr": learning_rate(self.optimizer),
        }
        row |= {f"train_{name}": value for name, value in self.task.summary(sums).items()}
        if not math.isfinite(row["train_loss"]):
            raise Diverged(f"the training loss is {row['train_loss']} at step {position.step}")
        self.eval_clock.start()
        model = self._evaluated_model()
        for split, source in self.data.evaluation.items():
            if split == "val" or cfg.select == "last":  # a test set that is selected on validation is looked at once
                row |= {f"{split}_{name}": value for name, value in self.evaluate(model, source).items()}
        self.eval_clock.stop()
        if self.filter is not None:
            row |= {f"filter_{name}": float(value) for name, value in self.filter.diagnostics().items()}
        if self.schedule_by == "plateau":
            self.schedule.step(row["val_loss"])
        if cfg.select == "best-val" and row["val_loss"] < position.best_val:
            position.best_val, position.best_epoch = row["val_loss"], row["epoch"]
            self.selected = replicas.model_state(self.module)
        self._note(row)
        if self.ranks.is_main:
            records.append_row(self.folder.metrics, row)
        position.rows, position.measured = position.rows + 1, position.step
        self.monitor.row(row)

    def _note(self, row: dict) -> None:
        """Keeps the lowest values so far and the first time each target was reached."""
        for name, value in row.items():
            if name.endswith(("_loss", "_error", "_ppl")) and math.isfinite(value):
                if name not in self.position.best or value < self.position.best[name]["value"]:
                    self.position.best[name] = {"value": value, "epoch": row["epoch"]}
        for name, target in (self.cfg.targets or {}).items():
            if name not in self.position.targets and row.get(name, math.inf) <= target:
                self.position.targets[name] = {
                    "target": target,
                    **{key: row[key] for key in ("epoch", "step", "seconds")},
                }

    def _evaluated_model(self) -> nn.Module:
        if self.average is not None:
            inputs = (self._placed(batch).inputs for batch in self.data.train.epoch(self.position.epoch))
            with self._autocast():
                model = self.average.evaluated(self.module, inputs)
            self.ranks.broadcast_buffers(model)
            return model
        if not replicas.is_sharded(self.module):
            self.ranks.check_replicas(self.module)
        self.ranks.broadcast_buffers(self.module)
        return self.module

    @torch.no_grad()
    def evaluate(self, model: nn.Module, source) -> dict[str, float]:
        """Metrics of `model` over every sample of `source`, once over all ranks."""
        task, sums = build_task(self.data.kind, self.data.num_classes), self._zero_sums()
        model.eval()
        with self._autocast():
            for batch in source:
                sums += task.losses(model, self._placed(batch))[1]
        model.train()
        return task.summary(self.ranks.sum(sums).tolist())

    def test_selected(self) -> dict:
        """For select=best-val: test metrics of the best-validation weights, and the epoch they are from."""
        replicas.load_model_state(self.module, self.selected)
        self.eval_clock.start()
        tested = self.evaluate(self.module, self.data.evaluation["test"])
        self.eval_clock.stop()
        return {
            **{f"test_{name}": value for name, value in tested.items()},
            "selected_epoch": self.position.best_epoch,
        }

    # State

    def save(self) -> None:
        """Writes a checkpoint of this step boundary, which all ranks are at."""
        self.train_clock.stop()
        state = {
            "config_hash": self.monitor.config_hash,
            "position": vars(self.position).copy(),
            "seconds": [self.train_clock.total, self.eval_clock.total],
            "model": replicas.model_state(self.module),
            "optimizer": replicas.optimizer_state(self.module, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "sums": self.ranks.sum(self.sums.clone()).cpu(),
            "task": self.task.state_dict(self.ranks),
            "selected": self.selected,
            "average": self.average.average.state_dict() if self.average else None,
        }
        checkpoint.save(self.folder.checkpoints, self.position.step, state, self.ranks)
        self.saved_at = time.perf_counter()
        self.train_clock.start()

    def restore(self, state: dict) -> None:
        """Goes on from a checkpoint's state.

        Raises:
            ConfigError: it belongs to another configuration.
        """
        if state.get("config_hash") != self.monitor.config_hash:
            raise ConfigError(
                f"checkpoint in {self.folder.checkpoints} has config_hash={state.get('config_hash')}, this run "
                f"{self.monitor.config_hash}; rerun=true starts again and moves it aside"
            )
        if sharded := bool(state.get("shards")):
            here = {
                "model": self.module.state_dict(),
                "optimizer": get_optimizer_state_dict(self.module, self.optimizer),
            }
            if state["selected"] is not None:
                here["selected"] = replicas.model_state(self.module)
            state = checkpoint.fill(state, here)
        replicas.load_model_state(self.module, state["model"])
        replicas.load_optimizer_state(self.module, self.optimizer, state["optimizer"], named=sharded)
        self.schedule.load_state_dict(state["schedule"])
        self.position = Position(**state["position"])
        self.sums = state["sums"].to(self.ranks.device) if self.ranks.is_main else self._zero_sums()
        self.task.load_state_dict(state["task"], self.ranks)
        self.selected = state["selected"]
        if self.average is not None:
            self.average.average.load_state_dict(state["average"])
        self.train_clock, self.eval_clock = (Stopwatch(seconds) for seconds in state["seconds"])
        self.monitor.resumed(self.position.step)
