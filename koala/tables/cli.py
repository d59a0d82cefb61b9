"""The command line of scripts/tables.py."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from koala.errors import ConfigError
from koala.records import write_atomically
from koala.tables import text, write
from koala.tables.experiment import find_experiments, load_experiment
from koala.tables.figures import draw
from koala.tables.measured import read_measured
from koala.tables.parts import FULL
from koala.tables.published import load_published
from koala.tables.readme import fill, overview
from koala.tables.runs import table_of_runs
from koala.tables.standings import over_tasks
from koala.tables.table import Table, build

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS, RESULTS = ROOT / "experiments", ROOT / "results"
FORMATS = ("markdown", "latex", "csv", "figures")


def load_tables(names: Iterable[str], measured: Path, profile: str | None = None) -> list[Table]:
    """Builds the named tables (all when none is named) from the rows in `measured`.

    Without a profile each table takes the first of its file that has been measured, or `full`.

    Raises:
        ConfigError: an unknown table or profile, or a fault in a file.
    """
    tables = []
    for name in names or find_experiments(EXPERIMENTS):
        experiment, rows = load_experiment(EXPERIMENTS, name), read_measured(measured, name)
        profiles = {row["profile"] for row in rows}
        shown = (other.name for other in experiment.profiles.values() if profiles & experiment.read_by(other))
        chosen = experiment.profile(profile or next(shown, FULL))
        tables.append(build(experiment, chosen, rows, load_published(RESULTS / "published", experiment)))
    return tables


def render(tables: list[Table], output: Path, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Writes every table in every format, below `output`/tables and `output`/figures; returns the files."""
    written = []
    for table in tables:
        drawn = draw(table, output / "figures") if "figures" in formats else {}
        written += [path for _, files in drawn.values() for path in files.values()]
        pages, folder = {}, (output / "tables" / table.name).parent
        if "markdown" in formats:
            links = {name: (caption, {panel: Path(os.path.relpath(file, folder)).as_posix()
                                      for panel, file in files.items()})
                     for name, (caption, files) in drawn.items()}  # fmt: skip
            standings = over_tasks(table, links.pop("profiles", None))
            pages["md"] = text.markdown(table, links, standings)
        if "latex" in formats:
            pages["tex"] = write.latex(table)
        if "csv" in formats:
            pages["csv"] = write.as_csv(table)
        written += [_save(output / "tables" / f"{table.name}.{suffix}", page) for suffix, page in pages.items()]
    return written


def _save(path: Path, content: str) -> Path:
    write_atomically(path, content.encode())
    return path


def _pages(tables: list[Table], write: bool) -> list[Path]:
    """Writes results/README.md, and README.md too if `write`."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before, tables)
    if after != before and not write:
        print("README.md is not up to date: --write fills it in")
    return [_save(RESULTS / "README.md", overview(tables)), *([_save(readme, after)] if write else [])]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    about = "Render tables and figures from recorded runs; runs nothing."
    parser = argparse.ArgumentParser(prog="tables.py", description=about)
    add = parser.add_argument
    add("table", nargs="*", help="e.g. koala/table6; all when none is named")
    add("--profile", help="records of this profile (default: the first that has any)")
    add("--measured", type=Path, default=RESULTS / "measured", help="folder of recorded rows")
    add("--runs", nargs="+", type=Path, metavar="FOLDER",
        help="a table of all finished runs below these folders, grouped by optimizer")  # fmt: skip
    add("--output", type=Path, help="tables/ and figures/ go here (default: results, or outputs/tables/runs)")
    add("--format", default=",".join(FORMATS), help=f"some of {','.join(FORMATS)}")
    add("--wandb", action="store_true", help="log them as one W&B run (offline without a key)")
    add("--write", action="store_true", help="fill in README.md too, where all tables are rendered")
    add("--print", action="store_true", help="show the tables in the terminal too")
    options = parser.parse_args(arguments)
    options.format = options.format.split(",")
    for name in options.format:
        if name not in FORMATS:
            raise ConfigError("--format", name, "is unknown", valid=FORMATS)
    if options.runs and (options.table or options.profile):
        raise ConfigError("--runs", None, "takes no table or profile: these are of experiment files")
    if not options.runs and not options.measured.is_dir():
        raise ConfigError("--measured", options.measured, "is not a folder of recorded rows")
    options.output = options.output or (Path("outputs/tables/runs") if options.runs else RESULTS)
    # results/README.md and the repository's README.md show all tables, or are left as they are.
    options.everything = not (options.runs or options.table or options.profile)
    options.everything &= options.output.resolve() == RESULTS and options.measured.resolve() == RESULTS / "measured"
    if options.write and not options.everything:
        raise ConfigError("--write", None, "README.md shows all tables: give no table, profile, --measured or --output")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Renders tables from records; returns the exit status: 0, or 2 for bad input."""
    try:
        options = _options(arguments)
        if options.runs:
            tables = [table_of_runs(options.runs)]
        else:
            tables = load_tables(options.table, options.measured, options.profile)
        # Of everything, only what is measured: the page over all tables lists the others.
        shown = [table for table in tables if table.rows or not options.everything]
        written = render(shown, options.output, options.format)
        written += _pages(tables, options.write) if options.everything else []
    except ConfigError as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"tables.py: --output {options.output}: cannot be written ({reason})", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    for table in shown if options.print or options.runs else ():
        write.show(table)
    if options.wandb:
        print(f"W&B run: {write.log_wandb(shown, Path(os.environ.get('WANDB_DIR', 'outputs')))}")
    return 0
