"""Spec, measured rows and printed numbers become one table of numbers, whatever it is rendered to later."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby

from koala.tables import age, stats
from koala.tables.metric import Metric, Scalar
from koala.tables.published import PrintedPoint, PublishedTable
from koala.tables.reduce import Number, final, in_turn, mean_or_none, reduce_metric, worst
from koala.tables.spec import ASSUMED, FULL, PAPER, Cell, Profile, Setting, Spec, override_value

ON_ASSUMPTIONS = "rests on settings that the paper does not say: assumed by us, as the notes of the table list them"


@dataclass(frozen=True)
class Trial:
    """One point of a cell's grid: the choosing metric over the runs that `tried` it for the choice, its mean (None: one
    failed), and all rows there are."""

    point: dict[str, Scalar]
    values: list[float | None]
    value: float | None
    tried: list[dict]
    rows: list[dict]


@dataclass
class Entry:
    """One cell of the table: its numbers by metric, the rows behind them, and every point of its grid."""

    key: dict[str, Scalar]
    cell: Cell
    settings: list[Setting]
    point: dict[str, Scalar]
    rows: list[dict]
    trials: list[Trial]
    numbers: dict[str, Number]
    evidence: list[int]
    sound: bool  # from clean commits and one version of everything, as are the runs that chose its rate
    departures: list[str]  # in what the runs are not what the full profile is (of one that compares), or their own

    @property
    def behind(self) -> list[dict]:
        """Its runs, and those that chose its rate."""
        return self.rows + self.tried

    @property
    def tried(self) -> list[dict]:
        """The runs that chose its rate."""
        return [row for trial in self.trials for row in trial.tried]


@dataclass
class Table:
    """A built table. `evidence` lists every row behind it; entries refer to it by position, counted from 1."""

    spec: Spec
    profile: Profile
    metrics: tuple[Metric, ...]
    published: PublishedTable | None
    entries: list[Entry]
    evidence: list[dict]
    printed: dict[str, tuple[PrintedPoint, ...]] = field(default_factory=dict)  # by figure of the spec
    beside: dict[str, "Table"] = field(default_factory=dict)  # by profile: whose runs measured some of the metrics

    @property
    def versions(self) -> dict[str, set[str]]:
        """What its newest runs were computed with (see koala.tables.age)."""
        return age.newest(row for entry in self.entries for row in entry.rows)

    @property
    def measured(self) -> bool:
        """Whether any run stands behind the table."""
        return bool(self.evidence)

    def entry(self, key: dict[str, Scalar]) -> Entry | None:
        """The cell `key`, or None where the table has a hole."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def measured_by(self, entry: Entry, metric: Metric) -> Entry:
        """The cell whose runs the metric of the cell `entry` is from: itself, or the same one of another profile."""
        return self.beside[metric.profile].entry(entry.key) if metric.profile else entry

    def groups(self) -> list[list[Entry]]:
        """The cells that are compared with each other: those that differ only in the compared axis."""
        rest = lambda entry: str(self.spec.rest(entry.key))  # noqa: E731
        return [list(group) for _, group in groupby(sorted(self.entries, key=rest), key=rest)]


def build(
    spec: Spec,
    profile: Profile,
    rows: Iterable[dict],
    published: PublishedTable | None,
    printed: dict[str, tuple[PrintedPoint, ...]] | None = None,
) -> Table:
    """The table of `spec` under `profile`, from those of `rows` that were run for that profile.

    Args:
        printed: points that papers print of the spec's figures, by the figure's name.
    """
    everything = list(rows)
    rows = [row for row in everything if row["profile"] == profile.name]
    table = Table(spec, profile, spec.metrics_of(profile), published, [], [], printed or {})
    for other in spec.read_by(profile) - {profile.name}:
        table.beside[other] = build(spec, spec.profile(other), everything, published)
    for cell in spec.cells(profile):
        mine = [row for row in rows if row["cell"] == cell.key and not cell.left_out]
        newest = age.newest(mine)
        now = [row for row in mine if not age.differing(row, newest)]
        if all(any(row["point"] == point for row in now) for point, _ in cell.settings):
            mine = now  # all of it measured again: the older rows have had their day
        point, chosen, trials = choose_point(mine, spec.choose)
        chosen.sort(key=lambda row: row["seed"])
        settings = spec.settings(cell.key) if spec.published or spec.sources else []
        first = len(table.evidence) + 1
        table.evidence += chosen
        evidence = list(range(first, first + len(chosen)))
        judge = spec.profile(FULL) if profile.comparable else profile
        apart = departures(chosen, spec, cell.key, judge, settings if spec.published and profile.comparable else [])
        entry = Entry(cell.key, cell, settings, point, chosen, trials, {}, evidence, False, apart)
        entry.sound = bool(chosen) and age.agree(entry.behind) and not any(map(age.doubts, entry.behind))
        table.entries.append(entry)
    latest = table.versions
    for entry in table.entries:
        marks = cell_marks(entry, table) + age.marks(entry.rows, latest, entry.tried)
        beside = published.find(spec.published_key(entry.key)) if published else {}
        for metric in table.metrics:
            if metric.profile:
                entry.numbers[metric.name] = table.measured_by(entry, metric).numbers[metric.name]
                continue
            base = table.entry(entry.key | {spec.compare: metric.relative}) if metric.relative is not None else None
            reference = {row["seed"]: row for row in base.rows} if base else {}
            entry.numbers[metric.name] = reduce_metric(
                metric.of(entry.key), entry.rows, reference, entry.cell, beside, len(spec.profile(FULL).seeds), marks,
                profile.comparable,
            )  # fmt: skip
    mark_best(table)
    for other in table.beside.values():
        for entry in table.entries:
            entry.evidence += [len(table.evidence) + number for number in other.entry(entry.key).evidence]
        table.evidence += other.evidence
    return table


def choose_point(rows: list[dict], metric: str) -> tuple[dict, list[dict], list[Trial]]:
    """The grid point with the lowest mean of `metric`, its rows, and the trial of every point.

    Points are compared over the seeds that all of them have. One with a diverged run stands behind every one without.
    Runs from before the cell had a grid are no trials: they have no point.
    """
    rows = [row for row in rows if row["point"]] or rows
    by_point = lambda row: str(sorted(row["point"].items()))  # noqa: E731
    groups = [list(group) for _, group in groupby(sorted(rows, key=by_point), key=by_point)]
    if not groups:
        return {}, [], []
    shared = set.intersection(*({row["seed"] for row in group} for group in groups))
    trials = []
    for group in groups:
        tried = [row for row in group if row["seed"] in shared]
        values = [chosen_by(row, metric) for row in tried] or [None]  # on other seeds nothing is compared
        trials.append(Trial(group[0]["point"], values, mean_or_none(values), tried, group))
    best = min(trials, key=lambda trial: math.inf if trial.value is None else trial.value)
    trials.sort(key=lambda trial: [value for value in trial.point.values() if isinstance(value, (int, float))])
    return best.point, best.rows, trials if len(trials) > 1 else []


def at_edge(trials: list[Trial], point: dict[str, Scalar]) -> bool:
    """Whether `point` is the smallest or the largest of its grid, so that nobody knows what lies beyond."""
    return bool(trials) and point in (trials[0].point, trials[-1].point)


def chosen_by(row: dict, key: str) -> float | None:
    """The run's value of the metric that chooses among grid points: its best where the run reports its best-validation
    model, else its last; None when it diverged."""
    if row["status"] == "finished" and row["config"].get("select") == "best-val":
        return (row["metrics"]["best"].get(key) or {}).get("value")
    return final(row, key)


def cell_marks(entry: Entry, table: Table) -> list[str]:
    """What sets the measured runs apart from the paper's (or, for a table of our own, from its full profile), and what
    makes them doubtful."""
    if not entry.rows:
        return []
    rows, profile, spec = entry.rows, table.profile, table.spec
    settings = entry.settings if spec.published else []  # a table of our own departs from nobody
    marks = [ON_ASSUMPTIONS] if any(setting.source == ASSUMED for setting in settings) else []
    if len(contents(rows)) > 1:
        marks.append(f"data of {len(contents(rows))} contents behind one cell")
    diverged = sum(row["status"] == "diverged" for row in rows)
    if diverged:
        marks.append(f"{diverged} of {len(rows)} runs diverged")
    if not profile.comparable:
        whose = "the paper's" if spec.published else "the full"
        marks.append(f"{profile.name} profile, not {whose} setting")
    return list(dict.fromkeys([*marks, *entry.departures]))


def contents(rows: list[dict]) -> set[str]:
    """The contents of the data that the rows are of; those of schema 1 do not say."""
    return {row["data"]["fingerprint"] for row in rows if row.get("data")}


def departures(
    rows: list[dict], spec: Spec, key: dict[str, Scalar], profile: Profile, settings: list[Setting]
) -> list[str]:
    """Where the runs of the cell `key` differ from `profile`, and whose word that is: by `settings` the paper's, its
    code's, or ours; without any, the profile's."""
    if not rows or not profile.seeds:  # runs that were found, not asked for
        return []
    said = {setting.key: setting.source for setting in settings}
    by = lambda key: said.get(key, ASSUMED if settings else profile.name)  # noqa: E731
    overrides, seeds = spec.overrides(key, profile, {}), len(profile.seeds)
    epochs, precision = override_value(overrides, "epochs"), override_value(overrides, "precision") or "fp32"
    if override_value(overrides, "max_steps"):
        epochs = None
    marks = [f"n = {len(rows)} ({by('seeds')}: {seeds})"] if len(rows) != seeds else []
    if (rates := len(spec.cell(key, profile).settings)) > 1 and not any(row["point"] for row in rows):
        marks.append(f"one rate (the best of {rates} or more in the full profile)")
    for row in rows:
        if row["status"] == "finished" and epochs and not math.isclose(row["epochs"], float(epochs), rel_tol=1e-6):
            # The epochs of an axis are a column of the printed table itself.
            marks.append(f"{row['epochs']:.4g} epochs ({PAPER if 'epochs' in key else by('epochs')}: {epochs})")
        if row["precision"] != precision:
            marks.append(f"{row['precision']} ({by('precision')}: {precision})")
    return list(dict.fromkeys(marks))


def mark_best(table: Table) -> None:
    """Marks, in each group that is compared, the best beyond noise or those that tie, and the best printed value."""
    for entries in table.groups():
        for metric in table.metrics:
            if metric.better != "neither" and not metric.profile:
                _mark_group(entries, metric)


def compared(entries: list[Entry], metric: Metric) -> list[Entry]:
    """The measured cells of a group, if they may be held against each other; else none.

    They may when one version of everything computed them all, from clean commits, on the same data, with as many
    trials, and they have enough seeds in common: a doubtful neighbour might be the better one. Times must be of one
    command as well.
    """
    measured = [entry for entry in entries if entry.numbers[metric.name].samples]
    shared = set.intersection(*(set(entry.numbers[metric.name].samples) for entry in measured)) if measured else set()
    fair = len(measured) > 1 and len(shared) >= stats.FEWEST and all(entry.sound for entry in measured)
    fair &= age.agree(row for entry in measured for row in entry.behind)
    fair &= len({text for entry in measured for text in contents(entry.rows)}) <= 1
    fair &= len({len(entry.trials) for entry in measured}) <= 1
    if metric.timed and metric.relative is None:  # what is relative was divided within one command
        fair &= in_turn([row for entry in measured for row in entry.rows])
    return measured if fair else []


def rank(entry: Entry, metric: Metric) -> float:
    """The number that the cell is ranked by: the one shown, or what a failure counts."""
    value = entry.numbers[metric.name].value
    return worst(metric) if value is None else value


def leader(measured: list[Entry], metric: Metric) -> Entry:
    """The cell with the best number shown."""
    return (max if metric.better == "higher" else min)(measured, key=lambda entry: rank(entry, metric))


def _mark_group(entries: list[Entry], metric: Metric) -> None:
    name, pick = metric.name, min if metric.better == "lower" else max
    if measured := compared(entries, metric):
        best = leader(measured, metric)
        ours, others = best.numbers[name].samples, [entry for entry in measured if entry is not best]
        ties = [entry for entry in others if not stats.beats(ours, entry.numbers[name].samples, metric.better)]
        for entry in (best, *ties):
            if entry.numbers[name].value is not None:
                entry.numbers[name] = replace(entry.numbers[name], best=not ties, tied=bool(ties))
    printed = [value for entry in entries if (value := entry.numbers[name].published) is not None]
    for entry in entries:
        if len(printed) > 1 and entry.numbers[name].published == pick(printed):
            entry.numbers[name] = replace(entry.numbers[name], published_best=True)
