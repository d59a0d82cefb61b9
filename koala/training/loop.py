"""One run on this rank: the order of things. Steps, looks, rows, checkpoints; what each is has a file of its own.

A batch goes from its source (koala/data) through `Step` to a tally on the device; every `log_every` steps a look reads
it, which is the only time that the host waits for the device; at the end of an epoch `Evaluation` makes it a row.
"""

import math
import os
import time
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor

from koala import models, records
from koala.data.base import Data, generator
from koala.training import checkpoint, parallel
from koala.training.adversarial import Adversarial, AdversarialStep, build_pair
from koala.training.clock import PHASES, Clock
from koala.training.evaluation import Diverged, Evaluation
from koala.training.machine import Arithmetic
from koala.training.monitor import Monitor
from koala.training.optimizers import build_optimizer, build_schedule, filter_of, learning_rate, needs_of
from koala.training.ranks import Ranks
from koala.training.state import Position, state_of
from koala.training.step import Step
from koala.training.stop import Stopped, box
from koala.training.tasks import build_task
from koala.training.whereabouts import Whereabouts


class Trainer:
    """One run on this rank, from its configuration to its last row.

    Args:
        data: this rank's part of it.
        folder: the run's; rows and checkpoints go there.
        segment: what is known of this process's part of the run, for its record (koala/records.py).

    Raises:
        ConfigError: data and model do not fit each other.
    """

    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        data: Data,
        folder: Path,
        monitor: Monitor,
        segment: dict | None = None,
    ):
        self.cfg, self.ranks, self.folder, self.monitor = cfg, ranks, folder, monitor
        self.clock, self.load = Clock(ranks.device), os.getloadavg()[0]
        self.segment, self.earlier, self.began = segment or {}, [], 0
        self.data = data
        adversarial = cfg.model.kind == "gan"
        self.task = Adversarial() if adversarial else build_task(self.data.kind, self.data.num_classes)
        torch.manual_seed(generator(cfg.seed, "weights").initial_seed())
        module = models.build(
            cfg.model,
            kind=self.data.kind,
            num_classes=self.data.num_classes,
            input_shape=self.data.input_shape,
        )
        if cfg.sync_bn:
            module = parallel.synchronised(module, ranks)
        flat = needs_of(cfg.optim).contiguous or (cfg.strategy == "fsdp" and ranks.world > 1)  # FSDP takes no other
        last = cfg.channels_last and self.data.kind == "images" and not flat
        arithmetic = Arithmetic(cfg.precision, ranks.device, torch.channels_last if last else torch.contiguous_format)
        self.module = module.to(ranks.device, arithmetic.dtype, memory_format=arithmetic.memory_format)
        net = parallel.distribute(self.module, ranks, cfg.strategy, cfg.compile)
        self.optimizer = (build_pair if adversarial else build_optimizer)(cfg.optim, cfg.wrapper, self.module)
        self.filter = filter_of(self.optimizer)
        self.steps_per_epoch = self.data.train.steps_per_epoch
        self.schedule, self.schedule_by = build_schedule(cfg.schedule, self.optimizer, cfg.epochs, self.steps_per_epoch)
        judged = (cfg, ranks, arithmetic, self.data, self.module, self._between_batches)
        if adversarial:
            from koala.training.frechet import AdversarialEvaluation  # here: torchmetrics takes a second to import

            self.step = AdversarialStep(cfg, ranks, arithmetic, self.module, self.optimizer)
            self.evaluation = AdversarialEvaluation(*judged, pictures=folder / "samples", show=monitor.picture)
        else:
            self.step = Step(cfg, ranks, arithmetic, self.task, self.module, net, self.optimizer)
            self.evaluation = Evaluation(*judged)
        self.position = Position()
        self.tally = self._no_tally()  # since the last row
        self.looked: list[float] = []  # the tally at the last look, over all ranks
        self.batches = 0  # of evaluation, since it began
        background = cfg.checkpoint_async is True or (cfg.checkpoint_async == "auto" and ranks.device.type == "cuda")
        self.writer = checkpoint.Writer(folder / checkpoint.FOLDER, ranks, background, cfg.timeout)
        self.saved_at = time.perf_counter()
        self.final: dict = {}  # of the weights that are reported: the last row's, and what was tested at the end

    def _no_tally(self) -> Tensor:
        """A tally (see koala/training/tasks.py) of nothing."""
        return torch.zeros(3 + len(self.task.errors), dtype=torch.float64, device=self.ranks.device)

    # The order of things

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        whole = self.cfg.epochs * self.steps_per_epoch
        return whole if self.cfg.max_steps is None else min(whole, self.cfg.max_steps)

    def fit(self) -> None:
        """Trains to the end of the configuration, from wherever `position` is.

        Raises:
            Diverged: a look at the loss, or an evaluation, found what is not finite.
            Stopped: a signal asked to.
        """
        position = self.position
        try:
            with Whereabouts(self.ranks, self.cfg.timeout):
                box.looked_into()
                if asked := self.ranks.largest(box.asked):
                    raise Stopped(asked, self.writer.saved)
                while position.owes_row or not self._at_end:
                    if not position.owes_row:
                        self._rest_of_epoch()
                        self._close_epoch()
                    if position.owes_row:
                        self._row()
                    asked, due = self.ranks.sum(self._wishes()).tolist()
                    if self._at_end or asked or due:
                        self.save()
                    if asked and not self._at_end:
                        self._stop()
                if self.cfg.select == "best-val":
                    self.final = self._evaluating(self.evaluation.test_selected)
                self.writer.wait()
        finally:
            self.writer.join()
            self.clock.switch("start")

    @property
    def _at_end(self) -> bool:
        return self.position.step >= self.steps

    def _rest_of_epoch(self) -> None:
        position = self.position
        for batch in self.data.train.epoch(position.epoch, position.index):
            self.tally += self.step(batch, self.data.train.samples(position.index, position.epoch), position.step)
            if self.schedule_by == "step":
                self.schedule.step()
            position.index, position.step = position.index + 1, position.step + 1
            if self.clock.phase == "start":
                self.clock.switch("train")
                self.clock.lap(position.step)
            if self._at_end or position.index == self.steps_per_epoch:
                return  # what follows looks as well
            self._between_steps()

    def _close_epoch(self) -> None:
        """Schedule and averages at the end of an epoch, or of what max_steps left of it."""
        position = self.position
        if position.index >= self.steps_per_epoch:
            position.epoch, position.index = position.epoch + 1, 0
            if self.schedule_by == "epoch":
                self.schedule.step()
            if self.evaluation.average is not None:
                self.evaluation.average.after_epoch(self.module, position.epoch)
        position.owes_row = self._at_end or (position.index == 0 and position.epoch % self.cfg.eval_every == 0)

    def _row(self) -> None:
        """Evaluates, and writes the row of this point of the run."""
        position = self.position
        tally = self.ranks.sum(self.tally.clone()).tolist()
        if self.clock.phase == "train":
            self.clock.lap(position.step)
        row = {
            "epoch": round(position.epoch + position.index / self.steps_per_epoch, 6),
            "step": position.step,
            "seconds": self.clock.total("train"),
            **learning_rate(self.optimizer),
        }
        row |= {f"train_{name}": value for name, value in self.task.summary(tally).items()}
        row = self._evaluating(self._measured, row)
        if self.ranks.is_main:
            records.append_row(self.folder / records.METRICS, row)
        self.monitor.row(row)
        position.rows, position.measured, position.owes_row = position.rows + 1, position.step, False
        self.tally, self.looked = self._no_tally(), []

    def _measured(self, row: dict) -> dict:
        """`row` with what is measured at the weights that are evaluated, and what the record keeps of it."""
        with self.evaluation.at_average(self.optimizer):
            row = self.evaluation.row(row)
            if self.filter is not None:
                row |= {f"filter_{name}": float(value) for name, value in self.filter.diagnostics().items()}
            if self.schedule_by == "plateau":
                self.schedule.step(row["val_loss"])
            self.evaluation.keep(row)
        return row

    def _evaluating(self, evaluate, *arguments):
        """`evaluate(*arguments)` on the clock of evaluation."""
        before, self.batches = self.clock.switch("eval"), 0
        result = evaluate(*arguments)
        self.clock.switch(before)
        return result

    # Looks

    def _between_steps(self) -> None:
        """Every `log_every` steps: is the loss finite, is a checkpoint due, was a stop asked for? All ranks agree.

        One rank alone looks at its clock and its signals after every step; that costs no wait for the device.
        """
        if self.position.step % self.cfg.log_every == 0:
            asked, due = self._look()
        elif self.ranks.world == 1:
            asked, due = box.asked, self._checkpoint_due()
        else:
            return
        if asked or due:
            self.save()
        if asked:
            self._stop()

    def _look(self) -> list[float]:
        """Reads the tally and tells of it; how many ranks were asked to stop, and how many find a checkpoint due."""
        step, known = self.position.step, self.filter.diagnostics() if self.filter is not None else {}
        state = self.ranks.sum(torch.cat([self._wishes(), self.tally]))
        watched = [value.detach().to(state).reshape(1) for value in known.values()]
        read = torch.cat([state, *watched]).tolist()  # the one read of the device
        wishes, tally, values = read[:2], read[2 : len(state)], read[len(state) :]
        seconds = self.clock.lap(step)
        if not math.isfinite(tally[1]):
            raise Diverged(f"the training loss is {tally[1] / tally[0]} at step {step}")
        recent = [now - then for now, then in zip(tally, self.looked or [0.0] * len(tally), strict=True)]
        self.looked = tally
        look = {"loss": self.task.summary(recent)["loss"], **learning_rate(self.optimizer)}
        look |= dict(zip(known, values, strict=True))
        if seconds:
            look |= {"rate": self.data.train.samples_per_step / seconds, "left": self._left()}
        self.monitor.look(step, look)
        self.writer.check()
        return wishes

    def _wishes(self) -> Tensor:
        """This rank's: whether a stop was asked for, and whether a checkpoint is due (float64 [2])."""
        return self.tally.new_tensor([float(box.asked > 0), float(self._checkpoint_due())])

    def _left(self) -> float:
        """Seconds to the end, if the rest goes as this segment went."""
        spent = sum(self.clock.seconds[phase] for phase in PHASES if phase != "start")
        spent += time.perf_counter() - self.clock.since
        return spent / max(1, self.position.step - self.began) * (self.steps - self.position.step)

    def _between_batches(self) -> None:
        """Between batches of evaluation, as often as between steps: was a stop asked for?"""
        self.batches += 1
        if self.ranks.world == 1:
            asked = box.asked
        elif self.batches % self.cfg.log_every == 0:
            asked = self.ranks.largest(box.asked)
        else:
            return
        if asked:
            if self.position.owes_row:  # else the weights are those that were selected, and the end of the run is saved
                self.save()
            self._stop()

    def _stop(self) -> NoReturn:
        self.writer.wait()
        raise Stopped(self.ranks.largest(box.asked), self.writer.saved)

    def _checkpoint_due(self) -> bool:
        return self.ranks.is_main and time.perf_counter() - self.saved_at >= self.cfg.checkpoint_every

    # What is kept

    def save(self) -> None:
        """Writes a checkpoint of this step boundary, which all ranks are at."""
        before = self.clock.switch("save")
        self.writer.save(self.position.step, state_of(self))
        self.saved_at = time.perf_counter()
        self.clock.switch(before)
