"""A table: the cells of an experiment under one profile, and the numbers that its runs and the paper give them."""

import itertools
import math
from dataclasses import dataclass, field

from koala.tables import samples, stats
from koala.tables.departures import contradictions, departures
from koala.tables.experiment import Experiment
from koala.tables.parts import ASSUMED, FULL, Cell, Key, Metric, Profile, Setting
from koala.tables.published import Published

ON_ASSUMPTIONS = "rests on settings that the paper does not give: assumed by us, as the notes of the table list them"
APART = "not timed one run at a time by one command"
BUSY = "the machine had other work meanwhile: its load is in the records"
IDLE = 0.5  # load average that a machine has for its own upkeep


@dataclass
class Number:
    """One metric of one cell: what was measured over n runs, what the paper prints, and what sets them apart.

    `samples` has each run's number by seed, infinite for one that failed; `statistic` to `high` summarize them (see
    stats.summarize). `status` says why there is no value. `difference` is measured minus published, only where the two
    answer the same question, and `sigmas` its size in standard errors. `others` is how many cells it is compared with,
    `wins` and `losses` how many of these are significantly worse and better. `best`: it wins against all; `tied`: it
    loses to none, and does not win against all.
    """

    metric: Metric
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
    others: int = 0
    wins: int = 0
    losses: int = 0
    best: bool = False
    tied: bool = False
    published_best: bool = False
    marks: tuple[str, ...] = ()

    @property
    def rank(self) -> float:
        """What the cell is ranked by, less being better: the value shown, or what a failure counts."""
        if self.value is None:
            return math.inf
        return -self.value if self.metric.better == "higher" else self.value


@dataclass
class Entry:
    """One cell of the table: the runs behind it, every point of its grid, and its numbers by metric."""

    cell: Cell
    task: str  # what it has in common with the cells it is compared with, in words
    label: str  # what the table calls its value of the compared axis
    optimizer: str  # by its name in configs/optim
    settings: list[Setting]
    point: Key
    rows: list[dict]
    trials: list[samples.Trial]
    contradictions: list[str]  # between the cell's settings and the configurations that its runs recorded
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
        """Digests of the data behind it; rows of schema 1 have none."""
        return {row["data"]["fingerprint"] for row in self.rows if row.get("data")}

    @property
    def measured(self) -> bool:
        """Whether any run is behind it, of its own profile or of another that measures some of its numbers."""
        return bool(self.rows) or any(number.samples for number in self.numbers.values())


@dataclass
class Table:
    """A built table."""

    name: str  # its experiment's
    experiment: Experiment
    profile: Profile
    metrics: dict[str, Metric]
    published: Published
    entries: list[Entry] = field(default_factory=list)
    beside: dict[str, "Table"] = field(default_factory=dict)  # by profile: whose runs measured some of the metrics

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
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(str(self.experiment.rest(entry.key)), []).append(entry)
        return [groups[rest] for rest in sorted(groups)]


def build(experiment: Experiment, profile: Profile, rows: list[dict], published: Published | None = None) -> Table:
    """The table of `experiment` under `profile`, from those of `rows` that were run for that profile."""
    metrics = experiment.metrics_of(profile)
    table = Table(experiment.name, experiment, profile, metrics, published or Published())
    for other in experiment.read_by(profile) - {profile.name}:
        table.beside[other] = build(experiment, experiment.profile(other), rows, published)
    table.entries = [_entry(table, cell, rows) for cell in experiment.cells(profile)]
    latest = samples.newest(row for entry in table.entries for row in entry.rows)
    for entry in table.entries:
        marks = _marks(table, entry) + samples.doubts(entry.rows, latest, entry.tried) + samples.hardware(entry.rows)
        for name, metric in table.metrics.items():
            if metric.profile:
                entry.numbers[name] = table.measured_by(entry, metric).numbers[name]
            else:
                entry.numbers[name] = _number(table, entry, metric, marks)
    for entries in table.groups():
        for name, metric in table.metrics.items():
            if metric.better != "neither" and not metric.profile:
                _compare(entries, name, metric)
    return table


def _entry(table: Table, cell: Cell, rows: list[dict]) -> Entry:
    """The cell's runs: those of its newest versions, once they are all of it, at the point that validation chose."""
    experiment, profile = table.experiment, table.profile
    rows = [row for row in rows if (row["profile"], row["cell"]) == (profile.name, cell.key) and not cell.left_out]
    latest = samples.newest(rows)
    present = [row for row in rows if samples.versions([row]).items() <= latest.items()]
    if all(any(row["point"] == point for row in present) for point, _ in cell.settings):
        rows = present
    point, chosen, trials = samples.choose(rows, experiment.choose)
    settings = experiment.settings(cell.key) if experiment.published or experiment.sources else []
    task = " · ".join(experiment.labels(experiment.rest(cell.key)))
    [label] = experiment.labels({experiment.compare: cell.key[experiment.compare]})
    return Entry(cell, task, label, experiment.optimizer(cell.key), settings, point, chosen, trials,
                 contradictions(experiment, profile, chosen),
                 departures(experiment, profile, cell.key, chosen, settings))  # fmt: skip


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
    return marks + entry.contradictions + entry.departures


def _number(table: Table, entry: Entry, metric: Metric, marks: list[str]) -> Number:
    """One number of a cell, next to the printed one, which is taken for a mean over the full profile's seeds."""
    experiment, metric = table.experiment, metric.of(entry.key)
    number = Number(metric)
    if metric.published:
        name = experiment.published_key(entry.key)
        number.published = table.published.number(name, metric.published)
        number.published_std = table.published.number(name, metric.published_std)
    base = metric.relative is not None and table.entry(entry.key | {experiment.compare: metric.relative})
    reference = {row["seed"]: row for row in base.rows} if base else {}
    number.samples = samples.of_runs(metric, entry.rows, reference)
    if not number.samples:
        number.status = _why_none(metric, entry)
        return number
    vars(number).update(stats.summarize(list(number.samples.values())))
    if number.n < len(entry.rows):
        marks = [*marks, f"{number.n} of {len(entry.rows)} runs have it"]
    if metric.timed:
        behind = entry.rows + [reference[row["seed"]] for row in entry.rows if row["seed"] in reference]
        marks = marks + [BUSY] * (max(map(samples.foreign_load, behind)) > IDLE)
        marks = marks + [APART] * (metric.relative is None and not samples.in_turn(entry.rows))
    number.marks = tuple(dict.fromkeys(marks))
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


def _comparable(entries: list[Entry], name: str) -> list[Number]:
    """The measured numbers of a group, if they may be compared by the metric `name`; else none.

    They may when one version of everything computed them all, from clean commits, on the same data, with as many
    trials, and they have enough seeds in common: a doubtful neighbour might be the better one. Times must be of one
    command as well.
    """
    measured = [entry for entry in entries if entry.numbers[name].samples]
    if len(measured) < 2 or not all(entry.rows for entry in measured):
        return []
    numbers, rows = [entry.numbers[name] for entry in measured], [row for entry in measured for row in entry.rows]
    behind = rows + [row for entry in measured for row in entry.tried]
    fair = samples.agree(behind) and not any(map(samples.uncommitted, behind))
    fair &= not any(entry.contradictions for entry in measured) and len({len(entry.trials) for entry in measured}) == 1
    fair &= len(set().union(*(entry.contents for entry in measured))) <= 1
    fair &= len(set.intersection(*(set(number.samples) for number in numbers))) >= stats.FEWEST
    if numbers[0].metric.timed and numbers[0].metric.relative is None:  # else it was divided within one command
        fair &= samples.in_turn(rows)
    return numbers if fair else []


def _compare(entries: list[Entry], name: str, metric: Metric) -> None:
    """Tests every two cells of a group, and marks the best or those tied for it, and the best printed value."""
    numbers = _comparable(entries, name)
    for one, other in itertools.combinations(numbers, 2):
        if difference := stats.significant(one.samples, other.samples):
            better, worse = (one, other) if (difference > 0) == (metric.better == "higher") else (other, one)
            better.wins += 1
            worse.losses += 1
    for number in numbers:
        number.others = len(numbers) - 1
        number.best = number.value is not None and number.wins == number.others
        number.tied = number.value is not None and not (number.losses or number.best)
    printed = [entry.numbers[name] for entry in entries if entry.numbers[name].published is not None]
    pick = max if metric.better == "higher" else min
    for number in printed if len(printed) > 1 else ():
        number.published_best = number.published == pick(other.published for other in printed)
