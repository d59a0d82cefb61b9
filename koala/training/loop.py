"""One run on this rank: the order of things. Steps, log lines, rows, checkpoints; what each is has a file of its own.

A batch goes from its source (koala/data) through the learner's step to a tally on the device. Every `log_every` steps
a log line reads it: the host waits for the device only there. At the end of an epoch `Evaluation` makes it a row.
"""

import contextlib
import math
import time
import warnings
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor

from koala import records
from koala.data.base import Data
from koala.errors import ConfigError
from koala.training import checkpoint
from koala.training.evaluation import Diverged
from koala.training.learner import Learner
from koala.training.machine import peak_memory
from koala.training.monitor import Monitor
from koala.training.optimizers import learning_rate
from koala.training.progress import PHASES, Progress, Result
from koala.training.rank_report import RankReport
from koala.training.ranks import Ranks
from koala.training.stop import Stopped, stop_signal
from koala.training.tally import Tally


class Trainer:
    """One run on this rank, from its configuration to its last row.

    Args:
        data: this rank's part of it.
        folder: the run's; rows and checkpoints go there.
        segment: what its record says of this process (koala/records.py), as far as it is known before training.

    Raises:
        ConfigError: data and model do not fit each other.
    """

    def __init__(
        self, cfg: DictConfig, ranks: Ranks, data: Data, folder: Path, monitor: Monitor, segment: dict | None = None
    ):
        self.cfg, self.ranks, self.data, self.folder, self.monitor = cfg, ranks, data, folder, monitor
        self.learner = Learner(cfg, ranks, data, self._between_batches, folder)
        self.task, self.evaluation = self.learner.task, self.learner.evaluation
        self.progress = Progress(ranks, self.learner, segment or {})
        self.position, self.clock = self.progress.position, self.progress.clock
        self.steps_per_epoch = data.train.steps_per_epoch
        all_steps = cfg.epochs * self.steps_per_epoch
        self.steps = all_steps if cfg.max_steps is None else min(all_steps, cfg.max_steps)  # of the run
        self.evaluated_batches = 0  # of the evaluation that is under way
        background = cfg.checkpoint_async is True or (cfg.checkpoint_async == "auto" and ranks.device.type == "cuda")
        self.writer = checkpoint.Writer(folder / checkpoint.FOLDER, ranks, background, cfg.timeout)
        self.saved_at = time.perf_counter()

    # The order of things

    def fit(self) -> Result:
        """Trains to the end of the configuration, from wherever `position` is.

        Raises:
            Stopped: on a signal; the checkpoint of the last step is there.
        """
        self.monitor.open(self.steps, self.position.step, self.task.unit)
        status, error, tested = "finished", None, {}
        with warnings.catch_warnings():
            # A deliberate use: AdaHessian differentiates the gradient; the step frees the graph itself.
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            try:
                tested = self._train()
            except Diverged as reason:
                status, error = "diverged", str(reason)
            except RuntimeError:
                self.writer.check()  # a write failed on every rank, and the first to see it broke this one's collective
                raise
        return self._result(status, error, tested)

    def _train(self) -> dict[str, float]:
        """Trains and evaluates; returns the test metrics of the selected weights, if any are selected."""
        position, tested = self.position, {}
        try:
            with RankReport(self.ranks, self.cfg.timeout) if self.ranks.world > 1 else contextlib.nullcontext():
                stop_signal.loop_started()
                if signum := self.ranks.largest(stop_signal.number):
                    raise Stopped(signum, self.writer.saved)
                while position.owes_row or not self._at_end:
                    if not position.owes_row:
                        self._rest_of_epoch()
                        self._close_epoch()
                    if position.owes_row:
                        self._row()
                    stop, save = self.ranks.sum(self._requests()).tolist()
                    if self._at_end or stop or save:
                        self.save()
                    if stop and not self._at_end:
                        self._stop()
                if self.cfg.select == "best-val":
                    tested = self._timed_evaluation(self.evaluation.test_selected)
                self.writer.wait()
        finally:
            self.writer.join()
            self.clock.switch("start")
        return tested

    @property
    def _at_end(self) -> bool:
        return self.position.step >= self.steps

    def _rest_of_epoch(self) -> None:
        position, learner, train = self.position, self.learner, self.data.train
        for batch in train.epoch(position.epoch, position.index):
            self.progress.tally += learner.step(batch, train.samples(position.index, position.epoch), position.step)
            if learner.schedule_by == "step":
                learner.schedule.step()
            position.index, position.step = position.index + 1, position.step + 1
            if self.clock.phase == "start":
                self.clock.switch("train")
                self.clock.lap(position.step)
            if self._at_end or position.index == self.steps_per_epoch:
                return  # the row that follows reads the tally as well
            self._between_steps()

    def _close_epoch(self) -> None:
        """Schedule and averages at the end of an epoch, or of what max_steps left of it."""
        position = self.position
        if position.index >= self.steps_per_epoch:
            position.epoch, position.index = position.epoch + 1, 0
            if self.learner.schedule_by == "epoch":
                self.learner.schedule.step()
            if self.evaluation.average is not None:
                self.evaluation.average.after_epoch(self.learner.module, position.epoch)
        position.owes_row = self._at_end or (position.index == 0 and position.epoch % self.cfg.eval_every == 0)

    def _row(self) -> None:
        """Evaluates, and writes the row of this point of the run."""
        position = self.position
        tally = self.progress.tally.over(self.ranks).on_host()
        if self.clock.phase == "train":
            self.clock.lap(position.step)
        row = {
            "epoch": round(self._epochs, 6),
            "step": position.step,
            "seconds": self.clock.total("train"),
            **learning_rate(self.learner.optimizer),
        }
        row |= {f"train_{name}": value for name, value in self.task.summary(tally).items()}
        row = self._timed_evaluation(self._evaluate, row)
        if self.ranks.is_main:
            records.append_row(self.folder / records.METRICS, row)
        self.monitor.row(row)
        if self.evaluation.image is not None:
            self.monitor.image(self.evaluation.image, position.step)
        position.rows, position.measured, position.owes_row = position.rows + 1, position.step, False
        self.progress.begin_tally()

    @property
    def _epochs(self) -> float:
        return self.position.epoch + self.position.index / self.steps_per_epoch

    def _evaluate(self, row: dict) -> dict:
        """`row` with what is measured at the weights that are evaluated; keeps what the record needs of it."""
        with self.evaluation.at_average(self.learner.optimizer):
            row = self.evaluation.measure(row)
            row |= {f"filter_{name}": float(value) for name, value in self.learner.diagnostics().items()}
            if self.learner.schedule_by == "plateau":
                self.learner.schedule.step(row["val_loss"])
            self.evaluation.keep_best(row)
        return row

    def _timed_evaluation(self, evaluate, *arguments):
        """`evaluate(*arguments)` on the clock of evaluation."""
        before, self.evaluated_batches = self.clock.switch("eval"), 0
        values = evaluate(*arguments)
        self.clock.switch(before)
        return values

    # Between steps

    def _between_steps(self) -> None:
        """Every `log_every` steps: is the loss finite, is a checkpoint due, is the run to stop? All ranks agree.

        One rank alone reads its clock and its signals after every step; that costs no wait for the device.
        """
        if self.position.step % self.cfg.log_every == 0:
            stop, save = self._log()
        elif self.ranks.world == 1:
            stop, save = stop_signal.number, self._checkpoint_due()
        else:
            return
        if stop or save:
            self.save()
        if stop:
            self._stop()

    def _log(self) -> list[float]:
        """Prints a log line; returns the sum over ranks of `_requests`."""
        step, estimates = self.position.step, self.learner.diagnostics()
        sums = self.ranks.sum(torch.cat([self._requests(), self.progress.tally.sums]))
        read = torch.cat([sums, *(value.detach().to(sums).reshape(1) for value in estimates.values())]).cpu()
        tally = Tally(read[2 : len(sums)], self.task.counts)
        seconds_a_step = self.clock.lap(step)
        loss = float(tally.losses.mean)
        if not math.isfinite(loss):
            raise Diverged(f"the training loss is {loss} at step {step}")
        values = {"loss": self.task.summary(tally - self.progress.logged)["loss"]}
        values |= learning_rate(self.learner.optimizer)
        values |= dict(zip(estimates, read[len(sums) :].tolist(), strict=True))
        if seconds_a_step:
            rate = self.data.train.samples_per_step / seconds_a_step
            values |= {"rate": rate, "seconds_left": self.progress.seconds_left(self.steps)}
        self.progress.logged = tally
        self.monitor.log(step, values)
        self.writer.check()
        return read[:2].tolist()

    def _requests(self) -> Tensor:
        """This rank's: whether it was told to stop, and whether a checkpoint is due (float64 [2])."""
        return self.progress.tally.sums.new_tensor([float(stop_signal.number > 0), float(self._checkpoint_due())])

    def _between_batches(self) -> None:
        """Between batches of evaluation, as often as between steps: is the run to stop?"""
        self.evaluated_batches += 1
        if self.ranks.world == 1:
            stop = stop_signal.number
        elif self.evaluated_batches % self.cfg.log_every == 0:
            stop = self.ranks.largest(stop_signal.number)
        else:
            return
        if stop:
            if self.position.owes_row:  # else the weights are those that were selected, and the end of the run is saved
                self.save()
            self._stop()

    def _stop(self) -> NoReturn:
        self.writer.wait()
        raise Stopped(self.ranks.largest(stop_signal.number), self.writer.saved)

    def _checkpoint_due(self) -> bool:
        return self.ranks.is_main and time.perf_counter() - self.saved_at >= self.cfg.checkpoint_every

    # State and result

    def save(self) -> None:
        """Writes a checkpoint of this step boundary, which all ranks are at."""
        before = self.clock.switch("save")
        self.writer.save(self.position.step, self.state_dict())
        self.saved_at = time.perf_counter()
        self.clock.switch(before)

    def state_dict(self) -> dict:
        """The state at a step boundary (a collective). Tensors may be the trainer's own."""
        return {"config_hash": self.monitor.config_hash, **self.learner.state_dict(), **self.progress.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Resumes from a checkpoint's state, as `checkpoint.load` gave it (a collective).

        Raises:
            ConfigError: it belongs to another configuration, or its content is not that of `state_dict`.
        """
        if state.get("config_hash") != self.monitor.config_hash:
            reason = f"its config_hash is {state.get('config_hash')}, this run's {self.monitor.config_hash}"
            raise checkpoint.refusal(state["path"], reason)
        try:
            self.learner.load_state_dict(state)
            self.progress.load_state_dict(state)
        except ConfigError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise checkpoint.refusal(state["path"], error) from None
        self.writer.saved = self.position.step
        self.monitor.resumed(self.position.step)

    def _result(self, status: str, error: str | None, tested: dict[str, float]) -> Result:
        rows = records.read_history(self.folder) if self.ranks.is_main else []
        last = rows[-1] if rows else {}
        final = {name: value for name, value in last.items() if name not in ("epoch", "step", "seconds", "lr")}
        segments, train = self.progress.segments(), self.clock.total("train")
        timed_steps = self.position.step - len(segments)  # the first step of a segment belongs to its start
        samples = timed_steps * self.data.train.samples_per_step
        return Result(
            status=status,
            error=error,
            metrics={"final": final | tested, "best": self.evaluation.best},
            steps=self.position.step,
            epochs=self._epochs,
            seconds={phase: self.clock.total(phase) for phase in PHASES},
            segments=segments,
            throughput=samples / train if train and samples > 0 else None,
            throughput_unit=self.task.unit,
            peak_memory_bytes=peak_memory(self.ranks.device),
            parameters=self.learner.trained_parameters,
            state_bytes=self.learner.optimizer_bytes,
        )
