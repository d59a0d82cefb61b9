"""What a person sees of a run: a progress bar or lines in the terminal, and the W&B mirror of the records."""

import datetime
import functools
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from koala import records
from koala.metrics import COLUMNS
from koala.terminal import Stream, console


class Monitor:
    """Shows and mirrors one run. On ranks other than the main one it stays silent.

    Args:
        opening: what the run's record begins with.
        path: the run's folder; W&B's files go there.
        is_main: whether this rank is the one that speaks.
    """

    def __init__(self, cfg: DictConfig, opening: records.Opening, path: Path, is_main: bool):
        self.cfg, self.opening, self.path, self.is_main = cfg, opening, path, is_main
        self.config_hash = opening["config_hash"]
        self.title = f"{opening['name']} seed {opening['seed']}"
        self.console = console(Stream(sys.stderr), quiet=not is_main, soft_wrap=True)
        self.bar = self.task = self.wandb = None

    def open(self, steps: int, done: int, unit: str) -> None:
        """Starts the bar (on a terminal) and the mirror, before the first step.

        Args:
            steps, done: steps of the whole run, and of what was done before.
            unit: what a rate counts: images, sentences or tokens.
        """
        self.steps, self.unit = steps, unit
        if not self.is_main:
            return
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task(self.title, total=steps, completed=done, text="")
            self.bar.start()
        if self.cfg.logger.name == "wandb":
            self.wandb = WandbMirror(self.cfg, self.path, self.opening, self.console)

    def log(self, step: int, values: dict) -> None:
        """A log line, between steps; on a terminal it is the bar's text.

        Args:
            values: loss, and lr if there is one; from the second line on rate (samples a second) and seconds_left; a
                filter's diagnostics.
        """
        if not self.is_main:
            return
        text = f"loss {values['loss']:.4f}"
        text += "".join(f"  {name} {values[name]:.4g}" for name in ("lr", "R", "gain") if name in values)
        if "rate" in values:
            left = datetime.timedelta(seconds=round(values["seconds_left"]))
            text += f"  {values['rate']:,.0f} {self.unit}/s  {left} left"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        else:
            self.console.print(f"{self.title}  step {step}/{self.steps}  {text}", highlight=False)
        if self.wandb:
            self.wandb.log({f"log/{name}": value for name, value in values.items()}, step)

    def row(self, row: dict) -> None:
        """Prints and mirrors a row of the history."""
        printed = (name for name in row if name in COLUMNS and COLUMNS[name].printed)
        values = "  ".join(f"{name} {row[name]:.4g}" for name in printed)
        self.console.print(f"{self.title}  epoch {row['epoch']:g}  {values}  {row['seconds']:.1f} s", highlight=False)
        if self.bar:
            self.bar.update(self.task, completed=row["step"])
        if self.wandb:
            self.wandb.row(row)

    def image(self, path: Path, step: int) -> None:
        """Mirrors an image that an evaluation made."""
        if self.wandb:
            self.wandb.image(path, step)

    def resumed(self, step: int) -> None:
        """The run resumes from a checkpoint."""
        self.console.print(f"{self.title}  resumed at step {step}", highlight=False)

    def close(self, record: dict | None) -> None:
        """Ends the bar and the mirror; `record` is None when the run stopped before its end."""
        if self.bar:
            self.bar.stop()
        if self.wandb:
            self.wandb.finish(record)


class WandbMirror:
    """The records, mirrored to Weights & Biases. Whatever happens to W&B, training continues."""

    def __init__(self, cfg: DictConfig, path: Path, opening: records.Opening, console: Console):
        self.console, self.run = console, None
        self.run = self._try(self._init, cfg, path, opening)
        for row in records.read_history(path):  # a resumed run's: offline, each of its processes has a file of its own
            self.row(row)

    @staticmethod
    def _init(cfg: DictConfig, path: Path, opening: records.Opening):
        import wandb

        logger = cfg.logger
        return wandb.init(
            project=logger.project,
            entity=logger.entity,
            dir=str(path),
            mode=wandb_mode(),
            group=logger.group or f"{opening['name']}/{opening['config_hash']}",
            name=f"{opening['name']}/seed{cfg.seed}",
            id=_wandb_id(path),
            resume="allow",
            reinit="finish_previous",
            tags=[cfg.data.name, cfg.model.name, cfg.optim.name, *logger.tags],
            config=OmegaConf.to_container(cfg, resolve=True),
            settings=wandb.Settings(
                silent=True, disable_git=True, console="off", init_timeout=20, disable_code=True, save_code=False
            ),
        )

    def _try(self, act: Callable, *arguments, **options):
        try:
            return act(*arguments, **options)
        except Exception as error:  # W&B raises many kinds, its own and the network's; none of them may end a run
            self.console.print(f"W&B: {type(error).__name__}: {error}; training continues with the local records only")
            self.run = None

    def row(self, row: dict) -> None:
        """Mirrors a row of metrics.jsonl."""
        self.log({name: value for name, value in row.items() if name != "step"}, row["step"])

    def log(self, values: dict, step: int) -> None:
        """Mirrors values at their step."""
        if self.run is not None:
            self._try(self.run.log, values, step=step)

    def image(self, path: Path, step: int) -> None:
        """Mirrors an image at its step."""
        if self.run is not None:
            import wandb

            self.log({"samples": wandb.Image(str(path))}, step)

    def finish(self, record: dict | None) -> None:
        """Mirrors the record as the run's summary and ends it."""
        if self.run is not None and record is not None:
            self._try(self.run.summary.update, _summary(record))
        if self.run is not None:
            self._try(self.run.finish, exit_code=0 if record and record["status"] == "finished" else 1)


def _summary(record: dict) -> dict:
    """Of W&B's run: its configuration and its history are there already."""
    final = {f"final/{name}": value for name, value in record["metrics"]["final"].items()}
    best = {f"best/{name}": best["value"] for name, best in record["metrics"]["best"].items()}
    return final | best | {key: record[key] for key in record if key not in ("config", "metrics", "segments")}


def _wandb_id(path: Path) -> str:
    """The id at W&B of the run in folder `path`, for as long as the folder exists.

    A resumed run keeps it; the same run on another machine, or begun again (rerun=true), is another one at W&B.
    """
    file = path / "wandb-id"
    if not file.exists():
        records.write_atomically(file, uuid.uuid4().hex[:16].encode())
    return file.read_text()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # not there, not to be read, not UTF-8, not a netrc
        return False


@functools.cache  # so that it prints once
def wandb_mode() -> str:
    """W&B's mode: WANDB_MODE if set, online when a key is there (environment or netrc), else offline."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if _has_key():
        return "online"
    print(
        "W&B: no key found, so runs are kept offline in their folders (`wandb login`, or `wandb sync DIR` later)",
        file=sys.stderr,
    )
    return "offline"
