"""From experiment files to runs: every cell's runs, each run once however many tables use it."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig

from koala import fingerprint, numerics, records
from koala.errors import ConfigError
from koala.records import Ended
from koala.runs import compose, run_dir
from koala.tables.experiment import Experiment, merge_overrides, override_values
from koala.tables.measured import row_of
from koala.tables.parts import Cell, Key, Profile, of_cell, one_of
from koala.tables.samples import uncommitted, versions
from koala.training.tasks import metric_keys

TIMING = "timing.json"  # beside a record: the command that ran all of it, and how many runs it had at a time


@dataclass(frozen=True)
class Run:
    """One training run: its folder, which names it, and the overrides of train.py that make it.

    Args:
        again: a record of another numerics version (koala/numerics.py), or of uncommitted changes, does not count, and
            is moved aside when the run starts.
        measured: the run's row in results/measured, which counts as its record.
    """

    path: Path
    overrides: tuple[str, ...]
    cfg: DictConfig = field(hash=False, compare=False, repr=False)
    again: bool = False
    measured: dict | None = field(default=None, hash=False, compare=False, repr=False)

    @property
    def command(self) -> str:
        """The command line of this run."""
        return shlex.join(["python", "train.py", *self.overrides])

    @property
    def launched(self) -> tuple[str, ...]:
        """The overrides that it is started with."""
        return (*self.overrides, "rerun=true") if self._on_disk() and self.record() is None else self.overrides

    def record(self) -> dict | None:
        """The record of the run if it ended (and, with `again`, is of this numerics version, from a clean commit).

        Raises:
            ConfigError: the record cannot be read (names the file).
        """
        candidates = (self._on_disk(), self.measured)
        return next((one for one in candidates if one and not (self.again and _outdated(one))), None)

    def row(self) -> dict | None:
        """The record with its history, and with `timing` if one command ran all of it (see koala.tables.measured)."""
        record = self.record()
        if record is None or record is self.measured:
            return record
        try:
            timing = {"timing": json.loads((self.path / TIMING).read_text())}
        except (OSError, ValueError):
            timing = {}
        return {**record, **timing, "history": records.read_history(self.path)}

    def _on_disk(self) -> dict | None:
        try:
            record = records.read_record(self.path)
        except ConfigError as error:
            reason = f"{error.reason}; move the run's folder aside to run it again"
            raise ConfigError(error.key, error.value, reason) from None
        return record if record and record["status"] in records.ENDED else None


def _outdated(record: dict) -> bool:
    """Whether a run made now would be of a newer numerics version, or of a commit where the record is of none."""
    older = versions([record])["numerics"] != {str(numerics.VERSION)}
    return older or bool(uncommitted(record)) and fingerprint.git()["dirty"] is False


@dataclass(frozen=True)
class Sample:
    """A run as a sample of a table's cell, at a point of the cell's grid."""

    spec: Experiment
    profile: Profile
    key: Key
    point: Key
    run: Run


class Plan:
    """The samples of the tables `specs` under the profile called `profile`, and the cells that cannot be run. Of a
    search it has the trials; koala.reproduce.search adds what follows from them.

    Args:
        extra: overrides that win over the files'.
        gpus: GPUs of a run that does not give a number; 0: there are none, or every run must give it.
        seeds: in place of the profile's.
        only: the cells to run, by axis and values; all cells where it is empty.
        data_paths: local copies by data set.
        again: runs of another numerics version, or of uncommitted changes, count as missing.
        measured: rows that count as records.

    Raises:
        ConfigError: a profile is missing, `only` names what a table lacks, or a cell's overrides make no valid run
            (names table and cell).
    """

    def __init__(self, specs: Iterable[Experiment], profile: str, *, extra: Iterable[str] = (), gpus: int = 0,
                 seeds: Iterable[int] | None = None, only: dict[str, list[str]] | None = None,
                 data_paths: dict[str, str] | None = None, again: bool = False,
                 measured: Iterable[dict] = ()):  # fmt: skip
        self.extra, self.gpus, self.again, self.data_paths = tuple(extra), gpus, again, data_paths or {}
        self.chosen_seeds = tuple(seeds or ())
        self.measured = {run_key(row): row for row in sorted(measured, key=lambda row: row["finished"])}
        self.samples: list[Sample] = []
        self.cells: dict[str, list[Cell]] = {}  # by table
        self.blocked: list[tuple[Experiment, Cell]] = []
        for spec in specs:
            chosen = spec.profile(profile)
            self.cells[spec.name] = chosen_cells(spec, chosen, only or {})
            for cell in self.cells[spec.name]:
                self.blocked += [(spec, cell)] if cell.blocked else []
                trials = of_cell(chosen.trial_seeds, cell.key) if len(cell.settings) > 1 else None
                for point, _ in cell.settings if cell.runs else ():
                    self.add(spec, chosen, cell.key, point, self.seeds(chosen)[:trials])

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the order of the tables; those of a timed table seed by seed over the optimizers."""
        number = {name: at for at, name in enumerate(self.tables())}
        order = lambda one: (number[one.spec.name], one.run.cfg.seed if one.profile.timed else 0)  # noqa: E731
        return list({sample.run.path: sample.run for sample in sorted(self.samples, key=order)}.values())

    @property
    def missing(self) -> list[Run]:
        """Runs without a record."""
        return [run for run in self.runs if run.record() is None]

    def tables(self) -> dict[str, list[Sample]]:
        """Samples by table."""
        tables: dict[str, list[Sample]] = {}
        for sample in self.samples:
            tables.setdefault(sample.spec.name, []).append(sample)
        return tables

    def seeds(self, profile: Profile) -> tuple[int, ...]:
        """The seeds of every cell."""
        return self.chosen_seeds or profile.seeds

    def add(self, spec: Experiment, profile: Profile, key: Key, point: Key, seeds: Iterable[int]) -> bool:
        """Adds the runs of a cell at a grid point; returns whether any was new.

        Raises:
            ConfigError: the overrides make no valid run, or one without a metric of the table (names table and cell).
        """
        overrides = self._overrides(spec.overrides(key, profile, point))
        try:
            cfg = compose(overrides)
            check_metrics(spec, profile, key, cfg)
        except ConfigError as error:
            where = f"{spec.path}: cell {key}: {error.key}"
            raise ConfigError(where, error.value, error.reason, valid=error.valid) from error
        folder = run_dir(cfg).parent  # of all seeds
        there = {one.run.path for one in self.samples if one.spec.name == spec.name and one.key == key}
        new = [seed for seed in seeds if folder / f"seed{seed}" not in there]
        for seed in new:
            seeded = cfg.copy()
            seeded.seed = seed
            row = self.measured.get((*folder.parts[-4:], seed))
            run = Run(folder / f"seed{seed}", (*overrides, f"seed={seed}"), seeded, self.again, row)
            self.samples.append(Sample(spec, profile, key, point, run))
        return bool(new)

    def _overrides(self, overrides: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a cell, with this plan's own added.

        A worker sees the one GPU that it is given, where this process sees all, so `auto` must become a number here:
        the number of ranks is part of what a run is.
        """
        data = override_values(overrides).get("data")
        local = [typed("data.path", self.data_paths[data])] if data in self.data_paths else []
        merged = merge_overrides([*overrides, *local, *self.extra])
        given = [text for text in merged if text.lstrip("+") != "num_gpus=auto"]
        return merge_overrides([f"num_gpus={self.gpus}", *given]) if self.gpus else merged

    def rows(self) -> list[dict]:
        """Rows of all runs that ended (see koala.tables.measured)."""
        rows = {run.path: row for run in self.runs if (row := run.row())}
        return [
            row_of(one.spec.name, one.profile.name, one.key, one.point, rows[one.run.path])
            for one in self.samples
            if one.run.path in rows
        ]


def chosen_cells(spec: Experiment, profile: Profile, only: dict[str, list[str]]) -> list[Cell]:
    """The cells of a table whose value of each axis in `only` is one of those it names.

    Raises:
        ConfigError: the table has no such axis, value or cell, or gives all values of the axis equally many trials.
    """
    cells = spec.cells(profile)
    if spec.compare in only and any(len(cell.settings) > 1 for cell in cells):
        reason = f"{spec.name} is a search, which gives every {spec.compare} as many trials"
        raise ConfigError("--only", spec.compare, reason, valid=[axis for axis in spec.axes if axis != spec.compare])
    for axis, values in only.items():
        one_of(f"--only: {spec.name}", axis, spec.axes)
        for value in values:
            one_of(f"--only: {spec.name}: {axis}", value, list(map(str, spec.axes[axis].values)))
    chosen = [cell for cell in cells if all(str(cell.key[axis]) in values for axis, values in only.items())]
    if not chosen:
        raise ConfigError("--only", only, f"{spec.name} has no such cell")
    return chosen


def typed(key: str, value: str) -> str:
    """`key=value` that Hydra reads as this very text: quoted where it would read something else, as in 1 or a,b."""
    try:
        same = OverridesParser.create().parse_override(f"{key}={value}").value() == value
    except HydraException:
        same = False
    return f"{key}={value if same else QuotedString(value, Quote.single).with_quotes()}"


def run_key(row: dict) -> tuple:
    """Which run a row is of: data, model, optimizer and hash, as its folders are called, and the seed."""
    return (*row["name"].split("/"), row["config_hash"], row["seed"])


def check_metrics(spec: Experiment, profile: Profile, cell: Key, cfg: DictConfig) -> None:
    """Checks, before it is started, that a run of the cell `cell` will have the numbers that the table reads.

    Raises:
        ConfigError: naming the metric, its key and the valid ones.
    """
    keys = metric_keys(cfg)
    for name, metric in ((name, metric.of(cell)) for name, metric in spec.metrics_of(profile).items()):
        if metric.key is not None and metric.key not in keys:
            raise ConfigError(f"metrics.{name}.key", metric.key, "a run has no such metric", valid=keys)
        if metric.record and metric.record.partition(".")[0] not in ("step_ms", *Ended.__annotations__):
            fields = Ended.__annotations__
            raise ConfigError(f"metrics.{name}.record", metric.record, "a record has no such field", valid=fields)
    if spec.choose and spec.choose not in keys:
        raise ConfigError("choose", spec.choose, "a run has no such metric", valid=keys)
