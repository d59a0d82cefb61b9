"""The table as people read it: rows, columns and the text of a cell, shared by every renderer."""

from dataclasses import dataclass, replace

from koala.tables import age, stats
from koala.tables.build import ON_ASSUMPTIONS, Entry, Table, Trial, at_edge
from koala.tables.metric import Metric, Scalar
from koala.tables.reduce import Number, step_ms
from koala.tables.spec import ASSUMED, PAPER, RELEASED, UNSAID


@dataclass(frozen=True)
class Column:
    """One column of numbers: the values of the column axes, and a metric."""

    key: dict[str, Scalar]
    metric: Metric
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One row: labels of the row axes, a number (or a hole) a column, and the evidence behind all of them."""

    key: dict[str, Scalar]
    labels: tuple[str, ...]
    entries: tuple[Entry, ...]
    numbers: tuple[Number | None, ...]


def columns(table: Table) -> list[Column]:
    """The columns in order: the column axes outside, the metrics inside."""
    spec = table.spec
    keys = _distinct(table, spec.columns)
    found = []
    for key in keys:
        heads = tuple(spec.axis(name).value(value).label for name, value in key.items())
        found += [Column(key, _headed(metric, key), heads) for metric in table.metrics]
    return found


def _headed(metric: Metric, key: dict[str, Scalar]) -> Metric:
    """The metric with the label that it has in the column `key`, where labels differ."""
    labels = (values[key[axis]] for field, axis, values in metric.by_cell if field == "label" and axis in key)
    return replace(metric, label=next(labels, metric.label))


def rows(table: Table) -> list[Row]:
    """The rows in order, but for those that the profile leaves out whole, which the notes name."""
    spec, heads = table.spec, columns(table)
    found = []
    for key in _distinct(table, spec.rows):
        labels = tuple(spec.axis(name).value(value).label for name, value in key.items())
        cells = {id(head): table.entry(_ordered(table, key | head.key)) for head in heads}
        entries = list({id(entry): entry for entry in cells.values() if entry}.values())
        if all(entry.cell.left_out and not entry.evidence for entry in entries):
            continue
        numbers = tuple(entry.numbers[head.metric.name] if (entry := cells[id(head)]) else None for head in heads)
        found.append(Row(key, labels, tuple(entries), numbers))
    return found


def _distinct(table: Table, names: tuple[str, ...]) -> list[dict[str, Scalar]]:
    found = []
    for entry in table.entries:
        key = {name: entry.key[name] for name in names}
        if key not in found:
            found.append(key)
    return found


def _ordered(table: Table, key: dict[str, Scalar]) -> dict[str, Scalar]:
    return {axis.name: key[axis.name] for axis in table.spec.axes}


def number_text(value: float, metric: Metric) -> str:
    """A value in the metric's own digits, or as a duration."""
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
    of 3 failed)"; "≈" before those that tie for the best.
    """
    failed = f"{number.n - number.finite} of {number.n} failed"
    if number.value is None:
        return f"{number.status} ({failed})" if number.finite else number.status
    text = number_text(number.value, metric)
    ends = [_end(number.low, "−∞", metric), _end(number.high, "∞", metric)]
    if (number.low, number.high) != (None, None):
        text += f" [{', '.join(ends)}]"
    text += f" ({number.n})" if number.statistic == "mean" else f" (median, {failed})"
    return f"≈ {text}" if number.tied else text


def _end(value: float | None, infinite: str, metric: Metric) -> str:
    return infinite if value is None else number_text(value, metric)


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


def marks(table: Table) -> dict[str, str]:
    """Every mark of the table with its letter (a, b, ..., aa, ...; † for assumptions), in order of appearance."""
    found = dict.fromkeys(
        mark for row in rows(table) for number in row.numbers for mark in (number.marks if number else ())
    )
    lettered = [mark for mark in found if mark != ON_ASSUMPTIONS]
    letters = {mark: _letter(index) for index, mark in enumerate(lettered)}
    return {mark: letters.get(mark, "†") for mark in found}


def _letter(index: int) -> str:
    text = ""
    while index >= 0:
        text = chr(ord("a") + index % 26) + text
        index = index // 26 - 1
    return text


def cell_text(entry: Entry, table: Table) -> str:
    """The cell in words: "CIFAR-100 · ResNet-18 · KOALA-M"."""
    return " · ".join(table.spec.axis(name).value(value).label for name, value in entry.key.items())


def point_text(point: dict[str, Scalar]) -> str:
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


def sources(table: Table) -> list[str]:
    """Whose word the settings of the full profile are: one line for each rule of the file, and one for what none names.

    A key stands with the values that the cells of the rule have, in their order; alone where configs/ says them.
    """
    lines = []
    for rule in (*table.spec.sources, UNSAID):
        values: dict[str, dict] = {}  # ordered sets
        for entry in table.entries:
            for setting in entry.settings:
                if setting.rule is rule:
                    values.setdefault(setting.key, {})[setting.value] = None
        keys = [key if None in found else f"{key} = {' | '.join(found)}" for key, found in values.items()]
        if keys:
            labels = [[table.spec.axis(axis).value(name).label for name in names] for axis, names in rule.match.items()]
            where = " · ".join(("; " if "," in "".join(names) else ", ").join(names) for names in labels)
            note = f" ({rule.note})" if rule.note else ""
            word = OURS if rule.source == ASSUMED and not table.spec.published else WORDS[rule.source]
            lines.append(f"{word}{note}{f', {where}' if where else ''}: {'; '.join(keys)}.")
    return lines


WORDS = {PAPER: "From the paper", RELEASED: "From the released code", ASSUMED: "† Assumed by us"}
OURS = "Our own"  # what is assumed, in a table that answers to no paper's


def _some(cells: list[str]) -> str:
    return "; ".join(cells) if len(cells) <= 6 else f"{len(cells)} cells, {cells[0]} to {cells[-1]}"


def ranges(numbers: list[int]) -> str:
    """Positions as people write them: [1, 2, 3, 7] is "1–3, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def evidence_rows(table: Table) -> list[tuple[str, ...]]:
    """What is behind each number: the run, its code, how long it took, and what else the machine was doing."""
    found = []
    for number, row in enumerate(table.evidence, 1):
        git = row.get("git") or {}
        commit = (git.get("commit") or "unknown")[:10] + (" + changes" if git.get("dirty") else "")
        loads = [load for part in row.get("segments") or () for load in part["load"]]
        milliseconds = step_ms(row)
        found.append(
            (
                str(number),
                str(row.get("name", "")),
                str(row["config_hash"]),
                str(row["seed"]),
                str(row["status"]),
                commit,
                " and ".join(sorted(age.versions(row)["numerics"])),
                str(row.get("device", "")),
                f"{row['epochs']:.4g}",
                f"{row['seconds']['train']:.1f}",
                "" if milliseconds is None else f"{milliseconds:.3g}",
                f"{min(loads):.1f}–{max(loads):.1f}" if loads else "",
                str(row.get("command", "")),
            )
        )
    return found


EVIDENCE_HEADS = (
    "#", "run", "config", "seed", "status", "commit", "numerics", "device", "epochs", "train s", "step ms", "load",
    "command",
)  # fmt: skip


def notes(table: Table) -> list[str]:
    """What the reader must know: the paper's place, the profile, how cells were reduced, assumptions, tuning, gaps."""
    spec, found = table.spec, []
    if table.published:
        printed = f"Published: {table.published.citation}, {table.published.place}."
        found.append(
            printed + (f" {table.published.note[0].upper()}{table.published.note[1:]}." if table.published.note else "")
        )
    about = f" {table.profile.about}" if table.profile.about else ""
    found.append(f"Profile {table.profile.name}.{about}")
    found.append(
        "A cell: mean [interval] (number of runs). A run that diverged or missed its target failed: it counts as "
        f"infinite, and the cell then shows the median and how many failed. {stats.INTERVALS}. Bold: best beyond noise "
        f"({stats.BEYOND}). ≈: the best, and what is not beyond noise of it."
    )
    if any(number.sigmas is not None for entry in table.entries for number in entry.numbers.values()):
        found.append(
            "Beside the published value: ours − published, within two standard errors of the difference, or so many σ "
            "away (our spread over our runs; the printed one, where one is printed, over the full profile's seeds)."
        )
    found += sources(table)
    found += [f"Assumed: {text}" for text in spec.assumptions]
    found += [_tuning(entry, table) for entry in table.entries if entry.trials]
    found += [f"{reason} ({_some(cells)})" for reason, cells in absent(table)]
    return found


def _came_to(trial: Trial) -> str:
    if trial.value is not None:
        return f"{trial.value:.4g}"
    return "diverged" if any(row["status"] == "diverged" for row in trial.tried) else "not on the others' seeds"


def _tuning(entry: Entry, table: Table) -> str:
    """Which grid point a cell is shown at, what the others came to, and whether a wider grid might do better."""
    tried = "; ".join(f"{next(iter(trial.point.values()))}: {_came_to(trial)}" for trial in entry.trials)
    edge = " It is at the edge of the grid: a wider one may do better." if at_edge(entry.trials, entry.point) else ""
    shown = f"{cell_text(entry, table)} is shown at {point_text(entry.point)}"
    seeds = max(len(trial.values) for trial in entry.trials)
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    return f"{shown}, chosen on {table.spec.choose} ({over}) among {len(entry.trials)}: {tried}.{edge}"
