"""From experiment files to runs: every cell's runs, each run once however many tables it stands in."""

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
from koala.reproduce.promise import check_metrics
from koala.runs import compose, run_dir
from koala.tables import age
from koala.tables.measured import row_of
from koala.tables.metric import Scalar
from koala.tables.spec import Cell, Profile, Spec, merge_overrides, override_value

TIMING = "timing.json"  # beside a record: which command ran it from start to end, and how many runs it had at a time


@dataclass(frozen=True)
class Run:
    """One training run: its folder, which names it, and what one would type to get it.

    `again`: a record of another numerics version (koala/numerics.py), or of uncommitted changes, does not count, and is
    moved aside when the run starts.
    `measured`: its row in results/measured, which stands for a record that another machine has.
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
        return (*self.overrides, "rerun=true") if self._found() and self.record() is None else self.overrides

    def record(self) -> dict | None:
        """Its record if it came to an end (and, with `again`, is of this numerics version, from a clean commit).

        Raises:
            ConfigError: the record cannot be read (names the file).
        """
        for record in (self._found(), self.measured):
            if record and not (self.again and self._outdated(record)):
                return record
        return None

    @staticmethod
    def _outdated(record: dict) -> bool:
        """Whether a run made now would be of a newer numerics version, or of a commit where the record is of none."""
        older = age.versions(record)["numerics"] != {str(numerics.VERSION)}
        return older or bool(age.doubts(record)) and fingerprint.git()["dirty"] is False

    def _found(self) -> dict | None:
        try:
            record = records.read_record(self.path)
        except ConfigError as error:
            raise ConfigError(f"{error}; move the run's folder aside to run it again") from None
        return record if record and record["status"] in records.ENDED else None

    def row(self) -> dict | None:
        """Its record as a row (see koala.tables.measured): with its history, and `timing`, the command that ran it, if
        one did from start to end."""
        record = self.record()
        if record is None or record is self.measured:
            return record
        try:
            timing = {"timing": json.loads((self.path / TIMING).read_text())}
        except (OSError, ValueError):
            timing = {}
        return {**record, **timing, "history": records.read_history(self.path)}


@dataclass(frozen=True)
class Place:
    """Where a run stands: a cell of a table, at a point of the cell's grid."""

    spec: Spec
    profile: Profile
    key: dict[str, Scalar]
    point: dict[str, Scalar]
    run: Run


@dataclass
class Plan:
    """All places of the chosen tables, and the cells that can't be run.

    Args:
        extra: overrides that win over the files'.
        gpus: GPUs of a run that does not say how many (or auto); 0: none are there, or the run must say.
        chosen_seeds: in place of the profile's.
        data_paths: local copies by data set.
        again: runs of another numerics version, or of uncommitted changes, count as missing.
        measured: rows that stand for records of other machines, by `which` run they are.
    """

    extra: tuple[str, ...] = ()
    gpus: int = 0
    chosen_seeds: tuple[int, ...] | None = None
    data_paths: dict[str, str] = field(default_factory=dict)
    again: bool = False
    measured: dict[tuple, dict] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    blocked: list[tuple[Spec, Cell]] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the order of the tables; those of a timed table seed by seed over the optimizers."""
        tables = list(dict.fromkeys(place.spec.name for place in self.places))
        order = lambda place: (tables.index(place.spec.name), place.run.cfg.seed if place.profile.timed else 0)  # noqa: E731
        return list({place.run.path: place.run for place in sorted(self.places, key=order)}.values())

    @property
    def timed(self) -> list[str]:
        """The tables that compare times."""
        return list(dict.fromkeys(place.spec.name for place in self.places if place.profile.timed))

    def tables(self) -> dict[str, list[Place]]:
        """Places by table."""
        found: dict[str, list[Place]] = {}
        for place in self.places:
            found.setdefault(place.spec.name, []).append(place)
        return found

    def seeds(self, profile: Profile) -> tuple[int, ...]:
        """The seeds of every cell."""
        return self.chosen_seeds or profile.seeds

    def add(
        self, spec: Spec, profile: Profile, key: dict[str, Scalar], point: dict[str, Scalar], seeds: Iterable[int]
    ) -> bool:
        """Places the runs of a cell at a grid point; returns whether any was not there yet.

        Raises:
            ConfigError: the overrides make no valid run, or one without a metric of the table (names table and cell).
        """
        overrides = spec.overrides(key, profile, point)
        data = override_value(overrides, "data")
        local = [typed("data.path", self.data_paths[data])] if data in self.data_paths else []
        merged = merge_overrides([*overrides, *local, *self.extra])
        if self.gpus:
            # The pool gives each run a GPU of its own, so that is what "auto" means here, whether somebody says it or
            # not: a worker sees one GPU where this process sees all, and ranks are part of what a run is.
            given = [text for text in merged if text.lstrip("+") != "num_gpus=auto"]
            merged = merge_overrides([f"num_gpus={self.gpus}", *given])
        try:
            cfg = compose(list(merged))
            check_metrics(spec, profile, key, cfg)
        except ConfigError as error:
            raise ConfigError(f"{spec.path}: cell {key}: {error}") from error
        there = {(str(place.key), place.run.path) for place in self.places if place.spec.name == spec.name}
        before = len(self.places)
        for seed in seeds:
            seeded = cfg.copy()
            seeded.seed = seed
            path = run_dir(seeded)
            row = self.measured.get((*path.parts[-5:-1], seed))
            run = Run(path, (*merged, f"seed={seed}"), seeded, self.again, row)
            if (str(key), run.path) not in there:
                self.places.append(Place(spec, profile, key, point, run))
        return len(self.places) > before

    def rows(self) -> list[dict]:
        """Rows for all runs that came to an end (see koala.tables.measured)."""
        found = {run.path: row for run in self.runs if (row := run.row())}
        return [
            row_of(place.spec.name, place.profile.name, place.key, place.point, found[place.run.path])
            for place in self.places
            if place.run.path in found
        ]


def typed(key: str, value: str) -> str:
    """`key=value` that Hydra reads as this very text: quoted where it would take it for something else, as 1 or a,b."""
    try:
        same = OverridesParser.create().parse_override(f"{key}={value}").value() == value
    except HydraException:
        same = False
    return f"{key}={value if same else QuotedString(value, Quote.single).with_quotes()}"


def which(row: dict) -> tuple:
    """The run that a row is of: its data, model, optimizer and hash, as its folders are called, and its seed."""
    return (*row["name"].split("/"), row["config_hash"], row["seed"])


def make_plan(
    specs: Iterable[Spec],
    profile: str,
    *,
    extra: Iterable[str] = (),
    gpus: int = 0,
    seeds: Iterable[int] | None = None,
    data_paths: dict[str, str] | None = None,
    again: bool = False,
    measured: Iterable[dict] = (),
) -> Plan:
    """The runs of `specs` under `profile`; of a search, its trials (see koala.reproduce.search for what follows).

    Raises:
        ConfigError: a profile is missing, or a cell's overrides make no valid run (names table and cell).
    """
    known = {which(row): row for row in sorted(measured, key=lambda row: row["finished"])}
    plan = Plan(tuple(extra), gpus, tuple(seeds) if seeds else None, data_paths or {}, again, known)
    for spec in specs:
        chosen = spec.profile(profile)
        for cell in spec.cells(chosen):
            if not cell.runs:
                plan.blocked += [(spec, cell)] if cell.blocked else []
                continue
            trials = chosen.trials(cell.key) if len(cell.settings) > 1 else None
            for point, _ in cell.settings:
                plan.add(spec, chosen, cell.key, point, plan.seeds(chosen)[:trials])
    return plan
