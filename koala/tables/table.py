"""A table: the cells of an experiment under one profile, and the numbers that its runs and the paper give them."""

import json
import math
from dataclasses import dataclass, field

from koala.run_keys import IMMATERIAL
from koala.tables import samples, stats
from koala.tables.experiment import Experiment, override_value
from koala.tables.parts import ASSUMED, FULL, PAPER, Cell, Key, Metric, Profile, Setting
from koala.tables.published import Published

ON_ASSUMPTIONS = "rests on settings that the paper does not give: assumed by us, as the notes of the table list them"
APART = "not timed one run at a time by one command"
BUSY = "the machine had other work meanwhile: its load is in the records"
ANY = {"epochs", "max_steps", "precision", *IMMATERIAL}  # settings that may differ: a departure, or of no effect
IDLE = 0.5  # load average that a machine has for its own upkeep


@dataclass
class Number:
    """One metric of one cell: what was measured over n runs, what the paper prints, and what sets them apart.

    `samples` has each run's number by seed, infinite for one that failed; `statistic` to `high` summarize them (see
    stats.summarize). `status` says why there is no value. `difference` is measured minus published, only where the two
    answer the same question, and `sigmas` its size in standard errors. `best`: significantly better than every other;
    `tied`: nothing is significantly better, and neither is this than all others.
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
    settings: list[Setting]
    point: Key
    rows: list[dict]
    trials: list[samples.Trial]
    tried: list[dict]  # the runs that chose its rate
    contents: set[str]  # of the data behind it; rows of schema 1 do not name them
    contradictions: list[str]  # between the cell's settings and the configurations that its runs recorded
    departures: list[str]  # in what the runs are not what the full profile is (of one that compares), or their own
    numbers: dict[str, Number] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The value of every axis."""
        return self.cell.key

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
                _mark_best(entries, name, metric)
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
    others = dict.fromkeys(mark for row in chosen for mark in _contradictions(experiment, profile, row))
    departures = _departures(experiment, profile, cell.key, chosen, settings)
    tried = [row for trial in trials for row in trial.tried]
    contents = {row["data"]["fingerprint"] for row in chosen if row.get("data")}
    return Entry(cell, settings, point, chosen, trials, tried, contents, list(others), departures)


def _contradictions(experiment: Experiment, profile: Profile, row: dict) -> list[str]:
    """Literal settings of the row's cell that its recorded configuration contradicts."""
    marks = []
    for override in experiment.overrides(row["cell"], profile, row["point"]) if profile.seeds else ():
        name, _, text = override.lstrip("+").partition("=")
        recorded = row["config"]
        for part in name.split("."):
            recorded = recorded.get(part) if isinstance(recorded, dict) else None
        try:
            wanted = json.loads(text)
        except ValueError:
            wanted = text
        recorded = recorded.get("name") if isinstance(recorded, dict) else recorded  # of a group, such as optim
        literal = isinstance(recorded, (str, bool, int, float)) and "${" not in text
        if literal and recorded != wanted and name.partition(".")[0] not in ANY:
            marks.append(f"recorded with {name}={recorded}, where this cell has {text}")
    return marks


def _departures(
    experiment: Experiment, profile: Profile, key: Key, rows: list[dict], settings: list[Setting]
) -> list[str]:
    """Where the runs of the cell `key` differ from the full profile (of a profile that does not compare with that: from
    itself), and where its setting is from: the paper, its code, or us; of a table of our own, the profile."""
    if not rows or not profile.seeds:  # a table without a file requests nothing
        return []
    judge = experiment.profile(FULL) if profile.comparable else profile
    answers = experiment.published and profile.comparable
    sources = {setting.key: setting.rule.source for setting in settings if answers}
    source = lambda name: sources.get(name, ASSUMED if answers else judge.name)  # noqa: E731
    overrides, seeds = experiment.overrides(key, judge, {}), len(judge.seeds)
    epochs, precision = override_value(overrides, "epochs"), override_value(overrides, "precision") or "fp32"
    marks = [f"n = {len(rows)} ({source('seeds')}: {seeds})"] if len(rows) != seeds else []
    if (rates := len(experiment.cell(key, judge).settings)) > 1 and not any(row["point"] for row in rows):
        marks.append(f"one rate (the best of {rates} or more in the full profile)")
    for override in experiment.overrides(key, profile, {}):
        name, _, value = override.lstrip("+").partition("=")
        if value != (other := override_value(overrides, name)) and name.partition(".")[0] not in ANY:
            marks.append(f"{name} = {value} ({source(name)}: {other or 'not given'})")
    for row in rows:
        counts = row["status"] == "finished" and epochs and not override_value(overrides, "max_steps")
        if counts and not math.isclose(row["epochs"], float(epochs), rel_tol=1e-6):
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


def compared(entries: list[Entry], name: str) -> list[Entry]:
    """The measured cells of a group, if they may be compared by the metric `name`; else none.

    They may when one version of everything computed them all, from clean commits, on the same data, with as many
    trials, and they have enough seeds in common: a doubtful neighbour might be the better one. Times must be of one
    command as well.
    """
    measured = [entry for entry in entries if entry.numbers[name].samples]
    if len(measured) < 2 or not all(entry.rows for entry in measured):
        return []
    rows, metric = [row for entry in measured for row in entry.rows], measured[0].numbers[name].metric
    behind = rows + [row for entry in measured for row in entry.tried]
    fair = samples.agree(behind) and not any(map(samples.uncommitted, behind))
    fair &= not any(entry.contradictions for entry in measured) and len({len(entry.trials) for entry in measured}) == 1
    fair &= len(set().union(*(entry.contents for entry in measured))) <= 1
    fair &= len(set.intersection(*(set(entry.numbers[name].samples) for entry in measured))) >= stats.FEWEST
    if metric.timed and metric.relative is None:  # what is relative was divided within one command
        fair &= samples.in_turn(rows)
    return measured if fair else []


def _mark_best(entries: list[Entry], name: str, metric: Metric) -> None:
    """Marks the cell of a group that is significantly better than every other, or those that none is significantly
    better than, and the best printed value."""
    if numbers := [entry.numbers[name] for entry in compared(entries, name)]:
        for number in (number for number in numbers if number.value is not None):
            others = [other for other in numbers if other is not number]
            if not any(stats.beats(other.samples, number.samples, metric.better) for other in others):
                number.best = all(stats.beats(number.samples, other.samples, metric.better) for other in others)
                number.tied = not number.best
    printed = [entry.numbers[name] for entry in entries if entry.numbers[name].published is not None]
    pick = max if metric.better == "higher" else min
    for number in printed if len(printed) > 1 else ():
        number.published_best = number.published == pick(other.published for other in printed)
