"""From experiment files to runs: every cell's runs, each run once however many tables it stands in."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from koala import records
from koala.errors import ConfigError
from koala.tables.measured import row_of
from koala.tables.spec import Cell, Profile, Scalar, Spec, merge_overrides, override_value
from koala.training import compose, run_dir


@dataclass(frozen=True)
class Run:
    """One training run: its folder, which names it, and what one would type to get it."""

    path: Path
    overrides: tuple[str, ...]
    cfg: DictConfig = field(hash=False, compare=False, repr=False)

    @property
    def command(self) -> str:
        """The command line of this run."""
        return shlex.join(["python", "train.py", *self.overrides])

    def record(self) -> dict | None:
        """Its record if it came to an end.

        Raises:
            ConfigError: the record cannot be read (names the file).
        """
        try:
            record = records.read_record(self.path)
        except ConfigError as error:
            raise ConfigError(f"{error}; move the run's folder aside to run it again") from None
        return record if record and record["status"] in records.ENDED else None


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
    """All places of the chosen tables, and the cells that can't be run."""

    places: list[Place] = field(default_factory=list)
    blocked: list[tuple[Spec, Cell]] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the order of the tables."""
        return list({place.run.path: place.run for place in self.places}.values())

    def tables(self) -> dict[str, list[Place]]:
        """Places by table."""
        found: dict[str, list[Place]] = {}
        for place in self.places:
            found.setdefault(place.spec.name, []).append(place)
        return found

    def rows(self) -> list[dict]:
        """Rows for all runs that came to an end (see koala.tables.measured)."""
        ended = {run.path: (run.record(), run) for run in self.runs}
        rows = []
        for place in self.places:
            record, run = ended[place.run.path]
            if record is not None:
                history = records.read_history(run.path)
                rows.append(row_of(place.spec.name, place.profile.name, place.key, place.point, record, history))
        return rows


def make_plan(
    specs: Iterable[Spec],
    profile: str,
    *,
    extra: Iterable[str] = (),
    seeds: Iterable[int] | None = None,
    data_paths: dict[str, str] | None = None,
) -> Plan:
    """The runs of `specs` under `profile`.

    Args:
        extra: overrides that win over the files'.
        seeds: in place of the profile's.
        data_paths: local copies by data set.

    Raises:
        ConfigError: a profile is missing, or a cell's overrides make no valid run (names table and cell).
    """
    plan = Plan()
    for spec in specs:
        chosen = spec.profile(profile)
        for cell in spec.cells(chosen):
            if not cell.runs:
                plan.blocked += [(spec, cell)] if cell.blocked else []
                continue
            for point, overrides in cell.settings:
                data = override_value(overrides, "data")
                local = [f"data.path={data_paths[data]}"] if data in (data_paths or {}) else []
                merged = merge_overrides([*overrides, *local, *extra])
                try:
                    cfg = compose(list(merged))
                except ConfigError as error:
                    raise ConfigError(f"{spec.path}: cell {cell.key}: {error}") from error
                for seed in seeds or chosen.seeds:
                    seeded = cfg.copy()
                    seeded.seed = seed
                    run = Run(run_dir(seeded), (*merged, f"seed={seed}"), seeded)
                    plan.places.append(Place(spec, chosen, cell.key, point, run))
    return plan
