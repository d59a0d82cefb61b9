"""A table: the cells of an experiment under one profile, and the numbers that its runs and the paper give them."""

import math
from dataclasses import dataclass, field
from itertools import groupby

from koala.tables import stats, versions
from koala.tables.choose import Trial, choose, foreign_load, in_turn, samples
from koala.tables.experiment import Cell, Experiment, Setting, override_value
from koala.tables.parts import ASSUMED, PAPER, Key, Metric, Profile
from koala.tables.published import PrintedPoint, PublishedTable
from koala.tables.rules import FULL

ON_ASSUMPTIONS = "rests on settings that the paper does not give: assumed by us, as the notes of the table list them"
APART = "not timed one run at a time by one command"
BUSY = "the machine had other work meanwhile: its load is in the records"
IDLE = 0.5  # load average that a machine has for its own upkeep


@dataclass
class Number:
    """One metric of one cell: what was measured over n runs, what the paper prints, and what sets them apart.

    `samples` has each run's number by seed, infinite for one that failed; `statistic` to `high` summarize them (see
    stats.summarize). `status` says why there is no value. `difference` is measured minus published, only where the two
    answer the same question, and `sigmas` its size in standard errors. `best`: significantly better than every other;
    `tied`: nothing is significantly better, and neither is this than all others.
    """

    samples: dict[int, float] = field(default_factory=dict)
    statistic: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    std: float | None = None
    n: int = 0
    finite: int = 0
    status: str = ""
    published: float | None = None
    published_std: float | None = None
    difference: float | None = None
    sigmas: float | None = None
    best: bool = False
    tied: bool = False
    published_best: bool = False
    marks: tuple[str, ...] = ()


@dataclass
class Entry:
    """One cell of the table: the runs behind it, every point of its grid, and its numbers by metric."""

    cell: Cell
    settings: list[Setting]
    point: Key
    rows: list[dict]
    trials: list[Trial]
    departures: list[str]  # in what the runs are not what the full profile is (of one that compares), or their own
    numbers: dict[str, Number] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The value of every axis."""
        return self.cell.key

    @property
    def tried(self) -> list[dict]:
        """The runs that chose its rate."""
        return [row for trial in self.trials for row in trial.tried]

    @property
    def contents(self) -> set[str]:
        """The contents of the data behind it; rows of schema 1 do not name them."""
        return {row["data"]["fingerprint"] for row in self.rows if row.get("data")}

    @property
    def sound(self) -> bool:
        """Whether its runs, and those that chose its rate, are of one version of everything and from clean commits."""
        behind = self.rows + self.tried
        return bool(self.rows) and versions.agree(behind) and not any(map(versions.uncommitted, behind))


@dataclass
class Table:
    """A built table."""

    experiment: Experiment
    profile: Profile
    metrics: dict[str, Metric]
    published: PublishedTable | None = None
    printed: dict[str, list[PrintedPoint]] = field(default_factory=dict)  # by figure of the experiment
    entries: list[Entry] = field(default_factory=list)
    beside: dict[str, "Table"] = field(default_factory=dict)  # by profile: whose runs measured some of the metrics

    @property
    def name(self) -> str:
        """Its experiment's."""
        return self.experiment.name

    @property
    def rows(self) -> list[dict]:
        """Every run behind it."""
        tables = (self, *self.beside.values())
        return [row for table in tables for entry in table.entries for row in entry.rows]

    def entry(self, key: Key) -> Entry | None:
        """The cell `key`, or None where the table has a hole."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def measured_by(self, entry: Entry, metric: Metric) -> Entry:
        """The cell whose runs the metric of the cell `entry` is from: itself, or the same one of another profile."""
        return self.beside[metric.profile].entry(entry.key) if metric.profile else entry

    def groups(self) -> list[list[Entry]]:
        """The cells that are compared with each other: those that differ only in the compared axis."""
        rest = lambda entry: str(self.experiment.rest(entry.key))  # noqa: E731
        return [list(group) for _, group in groupby(sorted(self.entries, key=rest), key=rest)]


def build(
    experiment: Experiment,
    profile: Profile,
    rows: list[dict],
    published: PublishedTable | None = None,
    printed: dict[str, list[PrintedPoint]] | None = None,
) -> Table:
    """The table of `experiment` under `profile`, from those of `rows` that were run for that profile.

    Args:
        printed: points that papers print of the experiment's figures, by the figure's name.
    """
    table = Table(experiment, profile, experiment.metrics_of(profile), published, printed or {})
    for other in experiment.read_by(profile) - {profile.name}:
        table.beside[other] = build(experiment, experiment.profile(other), rows, published)
    table.entries = [_entry(table, cell, rows) for cell in experiment.cells(profile)]
    latest = versions.newest(row for entry in table.entries for row in entry.rows)
    for entry in table.entries:
        marks = _marks(table, entry) + versions.doubts(entry.rows, latest, entry.tried) + versions.hardware(entry.rows)
        for name, metric in table.metrics.items():
            entry.numbers[name] = _number(table, entry, name, metric, list(dict.fromkeys(marks)))
    _mark_best(table)
    return table


def _entry(table: Table, cell: Cell, rows: list[dict]) -> Entry:
    """The cell's runs: those of its newest versions, once they are all of it, at the point that validation chose."""
    experiment, profile = table.experiment, table.profile
    rows = [row for row in rows
            if row["profile"] == profile.name and row["cell"] == cell.key and not cell.left_out]  # fmt: skip
    newest = versions.present(rows)
    if all(any(row["point"] == point for row in newest) for point, _ in cell.settings):
        rows = newest
    point, chosen, trials = choose(rows, experiment.choose)
    settings = experiment.settings(cell.key) if experiment.published or experiment.sources else []
    judge = experiment.profile(FULL) if profile.comparable else profile
    sources = settings if experiment.published and profile.comparable else []
    return Entry(cell, settings, point, chosen, trials, _departures(experiment, judge, cell.key, chosen, sources))


def _departures(
    experiment: Experiment, profile: Profile, key: Key, rows: list[dict], settings: list[Setting]
) -> list[str]:
    """Where the runs of the cell `key` differ from `profile`, and where its setting is from: by `settings` the paper,
    its code, or us; without any, the profile."""
    if not rows or not profile.seeds:  # a table without a file requests nothing
        return []
    sources = {setting.key: setting.rule.source for setting in settings}
    source = lambda name: sources.get(name, ASSUMED if settings else profile.name)  # noqa: E731
    overrides, seeds = experiment.overrides(key, profile, {}), len(profile.seeds)
    epochs, precision = override_value(overrides, "epochs"), override_value(overrides, "precision") or "fp32"
    if override_value(overrides, "max_steps"):
        epochs = None
    marks = [f"n = {len(rows)} ({source('seeds')}: {seeds})"] if len(rows) != seeds else []
    if (rates := len(experiment.cell(key, profile).settings)) > 1 and not any(row["point"] for row in rows):
        marks.append(f"one rate (the best of {rates} or more in the full profile)")
    for row in rows:
        if row["status"] == "finished" and epochs and not math.isclose(row["epochs"], float(epochs), rel_tol=1e-6):
            # The epochs of an axis are a column of the printed table itself.
            marks.append(f"{row['epochs']:.4g} epochs ({PAPER if 'epochs' in key else source('epochs')}: {epochs})")
        if row["precision"] != precision:
            marks.append(f"{row['precision']} ({source('precision')}: {precision})")
    return list(dict.fromkeys(marks))


def _marks(table: Table, entry: Entry) -> list[str]:
    """What sets the measured runs apart from the paper's (or, for a table of our own, from its full profile)."""
    rows, published = entry.rows, table.experiment.published
    if not rows:
        return []
    assumed = published and any(setting.rule.source == ASSUMED for setting in entry.settings)
    marks = [ON_ASSUMPTIONS] if assumed else []  # a table of our own departs from nobody
    if len(entry.contents) > 1:
        marks.append(f"data of {len(entry.contents)} contents behind one cell")
    if diverged := sum(row["status"] == "diverged" for row in rows):
        marks.append(f"{diverged} of {len(rows)} runs diverged")
    if not table.profile.comparable:
        whose = "the paper's" if published else "the full"
        marks.append(f"{table.profile.name} profile, not {whose} setting")
    return marks + entry.departures


def _number(table: Table, entry: Entry, name: str, metric: Metric, marks: list[str]) -> Number:
    """One number of a cell, next to the printed one, which is taken for a mean over the full profile's seeds."""
    if metric.profile:
        return table.measured_by(entry, metric).numbers[name]
    experiment, metric = table.experiment, metric.of(entry.key)
    cell = table.published.find(experiment.published_key(entry.key)) if table.published else {}
    printed = {"published": cell.get(metric.published), "published_std": cell.get(metric.published_std)}
    base = table.entry(entry.key | {experiment.compare: metric.relative}) if metric.relative is not None else None
    reference = {row["seed"]: row for row in base.rows} if base else {}
    values = samples(metric, entry.rows, reference)
    if not values:
        return Number(status=_why_none(metric, entry), **printed)
    if len(values) < len(entry.rows):
        marks = [*marks, f"{len(values)} of {len(entry.rows)} runs have it"]
    if metric.timed:
        behind = entry.rows + [reference[row["seed"]] for row in entry.rows if row["seed"] in reference]
        marks = marks + [BUSY] * (max(map(foreign_load, behind)) > IDLE)
        marks = marks + [APART] * (metric.relative is None and not in_turn(entry.rows))
    number = Number(values, marks=tuple(marks), **printed, **stats.summarize(list(values.values())))
    if number.value is None:
        diverged = metric.below is None or all(row["status"] == "diverged" for row in entry.rows)
        number.status = "diverged" if diverged else "not reached"
    elif number.published is not None and table.profile.comparable:
        number.difference = number.value - number.published
        if number.statistic == "mean":
            seeds = len(experiment.profile(FULL).seeds)
            number.sigmas = stats.sigmas(number.difference, number.std, number.n, number.published_std, seeds)
    return number


def _why_none(metric: Metric, entry: Entry) -> str:
    if not entry.rows:
        return "blocked" if entry.cell.blocked else "left out" if entry.cell.left_out else "not run"
    if metric.relative is not None:
        return "not measured together"
    return "not reached" if metric.below is not None else "not measured"


def compared(entries: list[Entry], name: str, metric: Metric) -> list[Entry]:
    """The measured cells of a group, if they may be compared; else none.

    They may when one version of everything computed them all, from clean commits, on the same data, with as many
    trials, and they have enough seeds in common: a doubtful neighbour might be the better one. Times must be of one
    command as well.
    """
    measured = [entry for entry in entries if entry.numbers[name].samples]
    if len(measured) < 2 or not all(entry.sound for entry in measured):
        return []
    shared = set.intersection(*(set(entry.numbers[name].samples) for entry in measured))
    contents = set().union(*(entry.contents for entry in measured))
    fair = len(shared) >= stats.FEWEST and len(contents) <= 1 and len({len(entry.trials) for entry in measured}) == 1
    fair &= versions.agree(row for entry in measured for row in entry.rows + entry.tried)
    if metric.timed and metric.relative is None:  # what is relative was divided within one command
        fair &= in_turn([row for entry in measured for row in entry.rows])
    return measured if fair else []


def rank(number: Number, metric: Metric) -> float:
    """What a cell is ranked by, less being better: the value shown, or what a failure counts."""
    value = metric.worst if number.value is None else number.value
    return -value if metric.better == "higher" else value


def _mark_best(table: Table) -> None:
    """Marks, in each group that is compared, the significantly best or those that tie, and the best printed value."""
    for entries in table.groups():
        for name, metric in table.metrics.items():
            if metric.better == "neither" or metric.profile:
                continue
            numbers = [entry.numbers[name] for entry in compared(entries, name, metric)]
            if numbers:
                best = min(numbers, key=lambda number: rank(number, metric))
                ties = [number for number in numbers if number is not best
                        and not stats.beats(best.samples, number.samples, metric.better)]  # fmt: skip
                for number in (best, *ties):
                    if number.value is not None:
                        number.best, number.tied = not ties, bool(ties)
            printed = [number for entry in entries if (number := entry.numbers[name]).published is not None]
            pick = max if metric.better == "higher" else min
            for number in printed if len(printed) > 1 else ():
                number.published_best = number.published == pick(other.published for other in printed)
