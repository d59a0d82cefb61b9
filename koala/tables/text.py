"""The table as people read it: the grid of its cells, their text, footnotes and notes; and the page in Markdown."""

from collections.abc import Callable, Mapping
from string import ascii_lowercase

import pandas as pd

from koala.tables import stats
from koala.tables.parts import ASSUMED, PAPER, RELEASED, UNNAMED, Key, Metric
from koala.tables.samples import at_edge, versions, versions_text
from koala.tables.table import ON_ASSUMPTIONS, Entry, Number, Table

COMMAND = "python scripts/tables.py"
CELL = "mean [95 % interval] (runs); bold: significantly best; ≈: tied for best"
WORDS = {PAPER: "From the paper", RELEASED: "From the released code", ASSUMED: "† Assumed by us"}
OURS = "Our own"  # what is assumed, in a table that answers to no paper's
HOW = (
    "A cell: mean [interval] (number of runs). A run that diverged or missed its target failed: it counts as infinite, "
    f"and the cell then shows the median and how many failed. {stats.INTERVALS}. Bold: significantly better than every "
    f"other ({stats.TESTS}). ≈: tied for best, no other being significantly better."
)
BESIDE = (
    "Beside the published value: ours − published, within two standard errors of the difference, or so many σ away "
    "(our spread over our runs; the printed one, where one is printed, over the full profile's seeds)."
)


def escape_markdown(words: object) -> str:
    """Text as it stands: no column breaks, no markup of its own."""
    signs = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {sign: f"\\{sign}" for sign in "\\`*_[]|"}
    return " ".join(str(words).translate(str.maketrans(signs)).split())


def markdown_table(frame: pd.DataFrame, right: int = 0) -> list[str]:
    """A frame of text that is Markdown already, its last `right` columns aligned to the right."""
    rule = ["---"] * (frame.shape[1] - right) + ["---:"] * right
    return ["| " + " | ".join(map(str, row)) + " |" for row in (frame.columns, rule, *frame.itertuples(index=False))]


def image(panel: str, caption: str, link: str) -> str:
    """A panel of a figure in Markdown."""
    return f"![{escape_markdown(', '.join(filter(None, (panel, caption))))}]({link})"


def images(caption: str, links: Mapping[str, str]) -> list[str]:
    """The panels of a figure side by side, their caption in italics below, in Markdown."""
    shown = " ".join(image(panel, caption, link) for panel, link in links.items())
    return [shown, "", f"*{escape_markdown(caption[0].upper() + caption[1:])}.*"]


def grid(table: Table, show: Callable, label: Callable = str, entries: list[Entry] | None = None) -> pd.DataFrame:
    """The numbers of these cells (of all, unless given), each as `show(number)`, a hole as "": the values of the column
    axes outside, the metrics inside. Its index has the labels of the rows, without those that the notes list as left
    out or not run."""
    experiment, rows, present = table.experiment, {}, set()
    for entry in table.entries if entries is None else entries:
        row, column = (experiment.labels({axis: entry.key[axis] for axis in axes})
                       for axes in (experiment.rows, experiment.columns))  # fmt: skip
        row = tuple(map(label, row))
        listed = entry.cell.left_out or (table.rows and _not_run(entry, table))
        present |= set() if listed and not entry.measured else {row}
        for name, number in entry.numbers.items():
            head = label(" · ".join([*column, table.metrics[name].of(entry.key).label]))
            rows.setdefault(row, {})[head] = show(number)
    heads = list(dict.fromkeys(head for cells in rows.values() for head in cells))
    names = [label(experiment.axes[axis].label or axis) for axis in experiment.rows]
    index = pd.MultiIndex.from_tuples([row for row in rows if row in present], names=names)
    return pd.DataFrame([[rows[row].get(head, "") for head in heads] for row in index], index, heads, dtype=object)


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


def measured_text(number: Number) -> str:
    """The number with its interval and n, or why there is none.

    A mean "23.41 [23.1, 23.7] (3)", a median once a run failed "7.0 [5.0, ∞] (median, 1 of 6 failed)", or "diverged (2
    of 3 failed)"; "≈" before those that are tied for best.
    """
    failed, metric = f"{number.n - number.finite} of {number.n} failed", number.metric
    if number.value is None:
        return f"{number.status} ({failed})" if number.finite else number.status
    text = number_text(number.value, metric)
    if (number.low, number.high) != (None, None):
        text += f" [{number_text(number.low, metric, '−∞')}, {number_text(number.high, metric)}]"
    text += f" ({number.n})" if number.statistic == "mean" else f" (median, {failed})"
    return f"≈ {text}" if number.tied else text


def published_text(number: Number) -> str:
    """The printed value, its spread if printed, and how far ours is from it; "" when there is none.

    "23.39 (+0.02, within)" or "23.39 ± 0.12 (+0.65, 3.1σ)"; without the last part where ours is a single run.
    """
    if number.published is None:
        return ""
    std = "" if number.published_std is None else f" ± {number_text(number.published_std, number.metric)}"
    text = number_text(number.published, number.metric) + std
    if number.difference is None:
        return text
    sign = "+" if number.difference >= 0 else "−"
    away = "" if number.sigmas is None else ", within" if number.sigmas <= 2 else f", {number.sigmas:.1f}σ"
    return f"{text} ({sign}{number_text(abs(number.difference), number.metric)}{away})"


def letters(table: Table) -> dict[str, str]:
    """Every mark of the table with its letter (a, b, ..., aa, ...; † for assumptions), in order of appearance."""
    shown = grid(table, lambda number: number.marks).to_numpy().ravel()
    marks = dict.fromkeys(mark for marks in shown for mark in marks)
    lettered = [mark for mark in marks if mark != ON_ASSUMPTIONS]
    more = [first + second for first in ("", *ascii_lowercase) for second in ascii_lowercase]
    return dict.fromkeys(marks, "†") | dict(zip(lettered, more, strict=False))


def footnotes(used: dict[str, str]) -> list[str]:
    """The marks in Markdown, each with its letter."""
    return [f"<sup>{letter}</sup> {escape_markdown(mark)}" for mark, letter in used.items()]


def cell_text(entry: Entry, table: Table) -> str:
    """The cell in words: "CIFAR-100 · ResNet-18 · KOALA-M"."""
    return " · ".join(table.experiment.labels(entry.key))


def point_text(point: Key) -> str:
    """A grid point in words: "optim.lr = 0.1"."""
    return ", ".join(f"{name} = {value}" for name, value in point.items())


def absent(table: Table) -> dict[str, list[str]]:
    """Why cells are not run ("Blocked: ...", "Left out: ...", "Not run"), each with the cells it is true of."""
    reasons: dict[str, list[str]] = {}
    for entry in table.entries:
        blocked, left_out = entry.cell.blocked, entry.cell.left_out
        if blocked or left_out or _not_run(entry, table):
            left_out = f"Left out of profile {table.profile.name}: {left_out}" if left_out else "Not run"
            reasons.setdefault(f"Blocked: {blocked}" if blocked else left_out, []).append(cell_text(entry, table))
    return reasons


def _not_run(entry: Entry, table: Table) -> bool:
    """Whether a cell of a table of our own, where no printed number stands for it, could be run and is not."""
    return not (entry.measured or entry.cell.blocked or entry.cell.left_out or table.experiment.published)


def notes(table: Table) -> list[str]:
    """What the reader must know: the paper's table, the profile, how cells were reduced, assumptions, gaps."""
    lines = [f"Published: {table.published.source}"] if table.published.source else []
    lines += [f"Profile {table.profile.name}. {table.profile.about}".strip(), HOW]
    if any(number.sigmas is not None for entry in table.entries for number in entry.numbers.values()):
        lines.append(BESIDE)
    lines += sources(table)
    lines += [f"Assumed: {text}" for text in table.experiment.assumptions]
    for reason, cells in absent(table).items():
        some = "; ".join(cells) if len(cells) <= 6 else f"{len(cells)} cells, {cells[0]} to {cells[-1]}"
        lines.append(f"{reason} ({some})")
    return lines


def searches(table: Table) -> list[str]:
    """For each cell with a grid: its point, what the others came to, and whether a wider grid might do better."""
    lines, choose = [], table.experiment.choose
    for entry in (entry for entry in table.entries if entry.trials):
        results = []
        for trial in entry.trials:
            failed = any(row["status"] == "diverged" for row in trial.tried)
            why = "diverged" if failed else "not on the others' seeds"
            [rate] = trial.point.values()
            results.append(f"{rate}: {why if trial.value is None else f'{trial.value:.4g}'}")
        edge = " It is at the edge of the grid: a wider one may do better." * at_edge(entry.trials, entry.point)
        seeds = max(len(trial.values) for trial in entry.trials)
        over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
        chosen = f"chosen on {choose} ({over}) among {len(results)}: {'; '.join(results)}.{edge}"
        lines.append(f"{cell_text(entry, table)} is shown at {point_text(entry.point)}, {chosen}")
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
            word = OURS if rule.source == ASSUMED and not experiment.published else WORDS[rule.source]
            note = f" ({rule.note})" if rule.note else ""
            lines.append(f"{word}{note}{f', {where}' if where else ''}: {'; '.join(keys)}.")
    return lines


def header(table: Table) -> str:
    """What a generated file says about itself."""
    computed = versions_text(versions(table.rows))
    return f"Generated by `{COMMAND} {table.name}` from {len(table.rows)} recorded runs ({computed}); do not edit."


def markdown_grid(table: Table, letters: dict[str, str], entries: list[Entry] | None = None) -> pd.DataFrame:
    """The grid in Markdown: what was measured, with its footnotes, and below it what the paper prints. A footnote of
    all numbers in a column stands in its heading instead."""
    numbers = grid(table, lambda number: number, escape_markdown, entries)
    for at, (head, column) in enumerate(zip(numbers.columns, numbers.to_numpy().T, strict=True)):
        marks = [number.marks for number in column if number and number.samples]
        common = [mark for mark in marks[0] if all(mark in other for other in marks)] if len(marks) > 1 else []
        others = {mark: letter for mark, letter in letters.items() if mark not in common}
        numbers.isetitem(at, [_markdown_cell(number, others) if number else "" for number in column])
        signs = " ".join(letters[mark] for mark in common if mark in letters)
        numbers = numbers.rename(columns={head: f"{head} <sup>{signs}</sup>"}) if signs else numbers
    return numbers


def _markdown_cell(number: Number, letters: dict[str, str]) -> str:
    shown = escape_markdown(measured_text(number))
    shown = f"**{shown}**" if number.best else shown
    signs = " ".join(letters[mark] for mark in number.marks if mark in letters)
    printed = escape_markdown(published_text(number))
    printed = f"**{printed}**" if number.published_best else printed
    return shown + (f" <sup>{signs}</sup>" if signs else "") + (f"<br>paper {printed}" if printed else "")


def markdown(table: Table, figures: Mapping[str, tuple[str, dict[str, str]]], standings: list[str]) -> str:
    """GitHub Markdown: title, numbers, footnotes, figures (caption, links by panel), `standings` over tasks, notes, and
    the searches, folded."""
    used, tried = letters(table), searches(table)
    shown = markdown_grid(table, used)
    lines = [f"<!-- {header(table)} -->", f"# {escape_markdown(table.experiment.title)}", ""]
    lines += [escape_markdown(table.experiment.caption), ""] if table.experiment.caption else []
    lines += [*markdown_table(shown.reset_index(), right=shown.shape[1]), ""]
    lines += [f"- {note}" for note in footnotes(used)]
    for figure in figures.values():
        lines += ["", *images(*figure)]
    lines += ["", *standings] if standings else []
    lines += ["", "## Notes", "", *(f"- {escape_markdown(note)}" for note in notes(table))]
    if table.rows and table.experiment.path:
        lines += [f"- The runs behind the numbers: `results/measured/{table.name}`, a line of JSON each."]
    if tried:
        lines += ["", f"<details><summary>What was tried for {len(tried)} cells</summary>", ""]
        lines += [*(f"- {escape_markdown(note)}" for note in tried), "", "</details>"]
    return "\n".join(lines) + "\n"
