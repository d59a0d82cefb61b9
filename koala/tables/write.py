"""A table as LaTeX (booktabs), as CSV, in the terminal and in W&B; koala.tables.text has it in Markdown."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from koala import terminal
from koala.tables import text
from koala.tables.figures import draw
from koala.tables.samples import gits, versions, versions_text
from koala.tables.standings import comparable, standings
from koala.tables.table import Number, Table
from koala.tables.text import escape_markdown, grid, markdown_table, measured_text, published_text

LATEX = {"±": r"$\pm$", "−": "$-$", "–": "--", "·": r"$\cdot$", "†": r"\dag{}", "≈": r"$\approx$", "∞": r"$\infty$",
         "σ": r"$\sigma$", "×": r"$\times$", "<": "$<$", ">": "$>$", "|": "$|$", "\\": r"\textbackslash{}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
         **{sign: "\\" + sign for sign in "&%$#_{}"}}  # fmt: skip
WITHIN = ("metric", "samples", "others", "wins", "losses")  # of a number: not columns of the long form


def long_frame(table: Table) -> pd.DataFrame:
    """The table in the long form, a row a cell and metric, nothing rounded."""
    rows = []
    for entry in table.entries:
        for name, metric in table.metrics.items():
            runs = table.measured_by(entry, metric)
            number = {key: value for key, value in vars(entry.numbers[name]).items() if key not in WITHIN}
            commits = {str(git.get("commit") or "unknown")[:10] for row in runs.rows for git in gits(row)}
            rows.append(entry.key | {"metric": name} | number | {
                "marks": "; ".join(number["marks"]), "point": text.point_text(runs.point),
                "configs": " ".join(sorted({row["config_hash"] for row in runs.rows})),
                "commits": " ".join(sorted(commits)), "versions": versions_text(versions(runs.rows)),
            })  # fmt: skip
    return pd.DataFrame(rows).astype({"value": float, "n": int, "finite": int})


def as_csv(table: Table) -> str:
    """The long form as CSV (RFC 4180); text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    harmless = lambda x: "'" + x if isinstance(x, str) and x[:1] in ("=", "+", "-", "@") else x  # noqa: E731
    return long_frame(table).map(harmless).to_csv(index=False, lineterminator="\n")


def escape_latex(words: str) -> str:
    """`words` with LaTeX's special characters written out."""
    return " ".join(words.translate(str.maketrans(LATEX)).split())


def latex(table: Table) -> str:
    r"""A `table` environment for the packages booktabs and multirow: measured and published side by side."""
    letters = text.letters(table)

    def ours(number: Number) -> str:
        shown = escape_latex(measured_text(number))
        signs = ",".join(escape_latex(letters[mark]) for mark in number.marks)
        return (rf"\textbf{{{shown}}}" if number.best else shown) + (rf"\textsuperscript{{{signs}}}" if signs else "")

    def paper(number: Number) -> str:
        shown = escape_latex(published_text(number))
        return rf"\textbf{{{shown}}}" if number.published_best else shown

    measured, printed = grid(table, ours, escape_latex), grid(table, paper, escape_latex)
    columns = {("", name): measured.index.get_level_values(name) for name in measured.index.names}
    for name in measured:
        columns[name, "ours"] = measured[name].array
        columns |= {(name, "paper"): printed[name].array} if printed[name].any() else {}
    layout = "l" * len(measured.index.names) + "r" * (len(columns) - len(measured.index.names))
    tabular = pd.DataFrame(columns).style.hide(axis="index").to_latex(
        hrules=True, column_format=layout, multicol_align="c"
    )  # fmt: skip
    title = escape_latex(f"{table.experiment.title}. {table.experiment.caption}")
    notes = [rf"\textsuperscript{{{escape_latex(sign)}}} {escape_latex(mark)}\par" for mark, sign in letters.items()]
    notes += [rf"{escape_latex(note)}\par" for note in (*text.notes(table), *text.searches(table))]
    head = [f"% {text.header(table)}", r"\begin{table}", r"\centering", rf"\caption{{{title}}}"]
    head += [rf"\label{{tab:{table.name.replace('/', ':')}}}"]
    return "\n".join([*head, tabular + r"\par\raggedright\footnotesize", *notes, r"\end{table}"]) + "\n"


def show(table: Table, console: Console | None = None) -> None:
    """Prints the grid in Markdown, the footnotes, the standings over tasks and what is blocked; the notes stay in the
    files."""
    letters, tasks = text.letters(table), comparable(table)
    shown = text.markdown_grid(table, letters).map(lambda cell: cell.replace("<br>", " "))
    lines = [f"**{escape_markdown(table.experiment.title)} ({table.name}, profile {table.profile.name})**", ""]
    lines += [*markdown_table(shown.reset_index(), right=shown.shape[1]), ""]
    lines += [f"- {note}" for note in text.footnotes(letters)]
    lines += ["", *markdown_table(standings(table).map(escape_markdown), right=5), ""] if tasks else []
    lines += [f"- {len(cells)} cells: {escape_markdown(reason)}" for reason, cells in text.absent(table).items()]
    (console or terminal.console()).print(Markdown("\n".join(lines)))


def log_wandb(tables: list[Table], folder: Path) -> Path:
    """Logs every table in the long form, and its figures, as one W&B run called `tables`; returns the run's local
    folder.

    Without a W&B key the run is written offline below `folder`; `wandb sync` uploads it later.
    """
    import wandb

    from koala.training.monitor import wandb_mode

    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="koala", name="tables", job_type="tables", dir=str(folder), mode=wandb_mode(),
                     settings=settings)  # fmt: skip
    with run:
        for table in tables:
            frame = long_frame(table)
            words = {name: str for name in frame if not pd.api.types.is_float_dtype(frame[name])}  # of one type each
            logged = {f"tables/{table.name}": wandb.Table(dataframe=frame.astype(words))}
            for caption, files in draw(table, folder / "wandb" / "figures", "png").values():
                logged |= {f"figures/{path.stem}": wandb.Image(str(path), caption=caption) for path in files.values()}
            run.log(logged)
    return Path(run.dir).parent
