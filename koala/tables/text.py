"""The table as people read it: rows, columns, the text of a cell, footnotes and notes, for every output."""

from dataclasses import dataclass
from string import ascii_lowercase

import pandas as pd

from koala.tables import stats
from koala.tables.choose import Trial, at_edge
from koala.tables.parts import ASSUMED, PAPER, RELEASED, UNNAMED, Key, Metric
from koala.tables.table import ON_ASSUMPTIONS, Entry, Number, Table

CELL = "mean [95 % interval] (runs); bold: significantly best; ≈: tied for best"
WORDS = {PAPER: "From the paper", RELEASED: "From the released code", ASSUMED: "† Assumed by us"}
OURS = "Our own"  # what is assumed, in a table that answers to no paper's


@dataclass(frozen=True)
class Column:
    """One column of numbers: the values of the column axes, and a metric as they read it."""

    key: Key
    name: str
    metric: Metric
    title: str


Row = tuple[list[str], list[Number | None]]  # labels of the row axes, and a number (or a hole) a column


def escape_markdown(words: object) -> str:
    """Text as it stands: no column breaks, no markup of its own."""
    escaped = str(words)
    for sign in "\\`*_[]":
        escaped = escaped.replace(sign, "\\" + sign)
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.replace("|", "\\|").split())


def markdown_table(frame: pd.DataFrame, right: int = 0) -> list[str]:
    """A frame of text that is Markdown already, its last `right` columns aligned to the right."""
    rule = ["---"] * (frame.shape[1] - right) + ["---:"] * right
    return ["| " + " | ".join(map(str, row)) + " |" for row in (frame.columns, rule, *frame.itertuples(index=False))]


def images(caption: str, links: dict[str, str]) -> list[str]:
    """The panels of a figure side by side, their caption in italics below, in Markdown."""
    shown = [
        f"![{escape_markdown(', '.join(filter(None, (panel, caption))))}]({link})" for panel, link in links.items()
    ]
    return [" ".join(shown), "", f"*{escape_markdown(caption[0].upper() + caption[1:])}.*"]


def columns(table: Table, entries: list[Entry]) -> list[Column]:
    """The columns of these cells in order: the column axes outside, the metrics inside."""
    result = []
    for key in _distinct(entries, table.experiment.columns):
        for name, metric in table.metrics.items():
            metric = metric.of(key)
            result.append(Column(key, name, metric, " · ".join([*table.experiment.labels(key), str(metric.label)])))
    return result


def rows(table: Table, entries: list[Entry]) -> list[Row]:
    """The rows of these cells in order, but for those that the profile leaves out and nothing is measured of."""
    heads, result = columns(table, entries), []
    for key in _distinct(entries, table.experiment.rows):
        cells = [table.entry({axis: (key | head.key)[axis] for axis in table.experiment.axes}) for head in heads]
        if not all(entry.cell.left_out and not is_measured(entry) for entry in cells if entry):
            numbers = [entry and entry.numbers[head.name] for entry, head in zip(cells, heads, strict=True)]
            result.append((table.experiment.labels(key), numbers))
    return result


def common_marks(table: Table, entries: list[Entry]) -> dict[str, list[str]]:
    """The marks that all measured numbers of a column have, by the column's title."""
    numbers = zip(*(numbers for _, numbers in rows(table, entries)), strict=True)
    marks = [[number.marks for number in column if number and number.samples] for column in numbers]
    heads = [head.title for head in columns(table, entries)]
    common = {title: [mark for mark in each[0] if all(mark in other for other in each)] if len(each) > 1 else []
              for title, each in zip(heads, marks, strict=False)}  # fmt: skip
    return dict.fromkeys(heads, []) | common


def is_measured(entry: Entry) -> bool:
    """Whether any run is behind the cell, of its own profile or of another that measures some of its numbers."""
    return bool(entry.rows) or any(number.samples for number in entry.numbers.values())


def _distinct(entries: list[Entry], axes: tuple[str, ...]) -> list[Key]:
    keys = [{axis: entry.key[axis] for axis in axes} for entry in entries]
    return [key for index, key in enumerate(keys) if key not in keys[:index]]


def number_text(value: float | None, metric: Metric, infinite: str = "∞") -> str:
    """A value in the metric's own digits, or as a duration."""
    if value is None:
        return infinite
    if not metric.duration:
        return f"{value:.{metric.digits}f}"
    if value < 60:
        return f"{value:.1f}s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def measured_text(number: Number, metric: Metric) -> str:
    """The number with its interval and n, or why there is none.

    A mean "23.41 [23.1, 23.7] (3)", a median once a run failed "7.0 [5.0, ∞] (median, 1 of 6 failed)", or "diverged (2
    of 3 failed)"; "≈" before those that are tied for best.
    """
    failed = f"{number.n - number.finite} of {number.n} failed"
    if number.value is None:
        return f"{number.status} ({failed})" if number.finite else number.status
    text = number_text(number.value, metric)
    if (number.low, number.high) != (None, None):
        text += f" [{number_text(number.low, metric, '−∞')}, {number_text(number.high, metric)}]"
    text += f" ({number.n})" if number.statistic == "mean" else f" (median, {failed})"
    return f"≈ {text}" if number.tied else text


def published_text(number: Number, metric: Metric) -> str:
    """The printed value, its spread if printed, and how far ours is from it; "" when there is none.

    "23.39 (+0.02, within)" or "23.39 ± 0.12 (+0.65, 3.1σ)"; without the last part where ours is a single run.
    """
    if number.published is None:
        return ""
    std = "" if number.published_std is None else f" ± {number_text(number.published_std, metric)}"
    text = number_text(number.published, metric) + std
    if number.difference is None:
        return text
    sign = "+" if number.difference >= 0 else "−"
    away = "" if number.sigmas is None else ", within" if number.sigmas <= 2 else f", {number.sigmas:.1f}σ"
    return f"{text} ({sign}{number_text(abs(number.difference), metric)}{away})"


def letters(table: Table) -> dict[str, str]:
    """Every mark of the table with its letter (a, b, ..., aa, ...; † for assumptions), in order of appearance."""
    numbers = (number for _, numbers in rows(table, table.entries) for number in numbers if number)
    marks = dict.fromkeys(mark for number in numbers for mark in number.marks)
    lettered = [mark for mark in marks if mark != ON_ASSUMPTIONS]
    more = [first + second for first in ("", *ascii_lowercase) for second in ascii_lowercase]
    return dict.fromkeys(marks, "†") | dict(zip(lettered, more, strict=False))


def cell_text(entry: Entry, table: Table) -> str:
    """The cell in words: "CIFAR-100 · ResNet-18 · KOALA-M"."""
    return " · ".join(table.experiment.labels(entry.key))


def point_text(point: Key) -> str:
    """A grid point in words: "optim.lr = 0.1"."""
    return ", ".join(f"{name} = {value}" for name, value in point.items())


def absent(table: Table) -> list[tuple[str, list[str]]]:
    """Why cells are not run ("Blocked: ...", "Left out: ..."), each with the cells it is true of."""
    reasons: dict[str, list[str]] = {}
    for entry in table.entries:
        blocked, left_out = entry.cell.blocked, entry.cell.left_out
        if blocked or left_out:
            reason = f"Blocked: {blocked}" if blocked else f"Left out of profile {table.profile.name}: {left_out}"
            reasons.setdefault(reason, []).append(cell_text(entry, table))
    return list(reasons.items())


def notes(table: Table) -> list[str]:
    """What the reader must know: the paper's table, the profile, how cells were reduced, assumptions, tuning, gaps."""
    lines = []
    if printed := table.published:
        note = f" {printed.note[0].upper()}{printed.note[1:]}." if printed.note else ""
        lines.append(f"Published: {printed.citation}, {printed.place}.{note}")
    lines.append(f"Profile {table.profile.name}." + (f" {table.profile.about}" if table.profile.about else ""))
    lines.append(
        "A cell: mean [interval] (number of runs). A run that diverged or missed its target failed: it counts as "
        f"infinite, and the cell then shows the median and how many failed. {stats.INTERVALS}. Bold: significantly "
        f"better than every other ({stats.TESTS}). ≈: tied for best, the best number not being significantly better."
    )
    if any(number.sigmas is not None for entry in table.entries for number in entry.numbers.values()):
        lines.append(
            "Beside the published value: ours − published, within two standard errors of the difference, or so many σ "
            "away (our spread over our runs; the printed one, where one is printed, over the full profile's seeds)."
        )
    lines += sources(table)
    lines += [f"Assumed: {text}" for text in table.experiment.assumptions]
    lines += [_tuning(entry, table) for entry in table.entries if entry.trials]
    for reason, cells in absent(table):
        some = "; ".join(cells) if len(cells) <= 6 else f"{len(cells)} cells, {cells[0]} to {cells[-1]}"
        lines.append(f"{reason} ({some})")
    return lines


def sources(table: Table) -> list[str]:
    """Where the settings of the full profile are from: one line for each rule of the file, and one for what none names.

    A key stands with the values that the cells of the rule have, in their order; alone where configs/ sets them.
    """
    lines, experiment = [], table.experiment
    for rule in (*experiment.sources, UNNAMED):
        values: dict[str, dict] = {}  # ordered sets
        for setting in (setting for entry in table.entries for setting in entry.settings if setting.rule is rule):
            values.setdefault(setting.key, {})[setting.value] = None
        if keys := [key if None in each else f"{key} = {' | '.join(each)}" for key, each in values.items()]:
            labels = [[experiment.labels({axis: value})[0] for value in names] for axis, names in rule.match.items()]
            where = " · ".join(("; " if "," in "".join(names) else ", ").join(names) for names in labels)
            note = f" ({rule.note})" if rule.note else ""
            word = OURS if rule.source == ASSUMED and not experiment.published else WORDS[rule.source]
            lines.append(f"{word}{note}{f', {where}' if where else ''}: {'; '.join(keys)}.")
    return lines


def _tuning(entry: Entry, table: Table) -> str:
    """Which grid point a cell is shown at, what the others came to, and whether a wider grid might do better."""
    tried = "; ".join(f"{next(iter(trial.point.values()))}: {_result(trial)}" for trial in entry.trials)
    edge = " It is at the edge of the grid: a wider one may do better." if at_edge(entry.trials, entry.point) else ""
    seeds = max(len(trial.values) for trial in entry.trials)
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    chosen = f"chosen on {table.experiment.choose} ({over}) among {len(entry.trials)}: {tried}.{edge}"
    return f"{cell_text(entry, table)} is shown at {point_text(entry.point)}, {chosen}"


def _result(trial: Trial) -> str:
    if trial.value is not None:
        return f"{trial.value:.4g}"
    return "diverged" if any(row["status"] == "diverged" for row in trial.tried) else "not on the others' seeds"


def footnotes(used: dict[str, str]) -> list[str]:
    """The marks in Markdown, each with its letter."""
    return [f"<sup>{letter}</sup> {escape_markdown(mark)}" for mark, letter in used.items()]
