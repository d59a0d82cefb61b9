"""The command line of scripts/tables.py."""

import argparse
import os
import sys
from pathlib import Path

from koala import numerics
from koala.errors import ConfigError
from koala.tables import age, layout
from koala.tables.build import Table
from koala.tables.publish import FORMATS, ROOT, Places, load_tables, publish, update_readme
from koala.tables.runs import table_of_runs
from koala.tables.spec import FULL
from koala.tables.terminal import show

RESULTS = ROOT / "results"
MEASURED = RESULTS / "measured"


def check(tables: list[Table]) -> int:
    """Lists the measured cells that are not from clean commits, of this numerics version and of the libraries of their
    neighbours, and what measures them again."""
    stale = there = 0
    for table in (one for each in tables for one in (each, *each.beside.values())):
        latest = table.versions | {"numerics": {str(numerics.VERSION)}}
        measured = [entry for entry in table.entries if entry.rows]
        there += len(measured)
        found = {layout.cell_text(entry, table): age.doubts_of(entry.rows, latest, entry.tried) for entry in measured}
        if found := {cell: doubts for cell, doubts in found.items() if doubts}:
            stale += len(found)
            print(f"{table.spec.name}: {len(found)} of {len(measured)} measured cells\n    {again(table)}")
        for cell, doubts in found.items():
            print(f"    {cell}: {'; '.join(doubts)}")
    if stale:
        print(f"{stale} cells are to be measured again")
    else:
        print(f"all measured cells are of numerics {numerics.VERSION}" if there else "nothing is measured")
    return 1 if stale else 0


def again(table: Table) -> str:
    """The command that measures the table's present rows again at this numerics version."""
    words = ["python scripts/reproduce.py", table.spec.name]
    words += [] if table.profile.name == FULL else ["--profile", table.profile.name]
    data = {row["config"]["data"]["name"]: row["config"]["data"] for row in table.evidence if "data" in row["config"]}
    local = [name for name, config in data.items() if config.get("hub") or config.get("path")]
    return " ".join([*words, *(f"--data-path {name}=DIR" for name in local), "--again --collect"])


def main(arguments: list[str] | None = None) -> int:
    """Renders tables from records; returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="tables.py", description="Render tables and figures from recorded runs; runs nothing."
    )
    parser.add_argument("table", nargs="*", help="e.g. koala/table6; all when none is named")
    parser.add_argument("--profile", help="records of this profile (default: the first that has any)")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="folder of recorded rows")
    parser.add_argument(
        "--runs", nargs="+", type=Path, metavar="FOLDER",
        help="a table of all finished runs below these folders, such as a sweep's, grouped by optimizer",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="tables/ and figures/ go here (default: results; with --runs, outputs/tables/runs)"
    )
    parser.add_argument(
        "--format", default=",".join(FORMATS),
        help=f"some of {','.join(FORMATS)} (the html in results is of all tables, or is left as it is)",
    )  # fmt: skip
    parser.add_argument(
        "--wandb", action="store_true", help="log tables and figures as one W&B run (offline without a key)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="render nothing; list cells of other versions or of uncommitted code; status 1 if any",
    )
    parser.add_argument("--write", action="store_true", help="fill in README.md too, where all tables are rendered")
    parser.add_argument("--print", action="store_true", help="show the tables in the terminal too")
    options = parser.parse_args(arguments)
    try:
        formats = options.format.split(",")
        for format in formats:
            if format not in FORMATS:
                raise ConfigError(f"--format {format}: unknown; valid: {', '.join(FORMATS)}")
        if options.runs and (options.table or options.profile):
            raise ConfigError("--runs: takes no table or profile; the runs say what they are")
        if options.runs and options.check:
            raise ConfigError("--check: of cells that an experiment file can measure again; --runs has no such file")
        if not options.runs and not options.measured.is_dir():
            raise ConfigError(f"--measured {options.measured}: is not a folder of recorded rows")
        options.output = options.output or (Path("outputs/tables/runs") if options.runs else RESULTS)
        # results/ has an overview, and the repository its README: both and the page there are of everything at once.
        shared = not options.runs and options.output.resolve() == RESULTS
        everything = shared and not options.table and not options.profile and options.measured.resolve() == MEASURED
        if options.write and not everything:
            raise ConfigError(
                "--write: README.md shows all tables; give neither table, profile, --measured nor --output"
            )
        if shared and not everything:
            formats = [format for format in formats if format != "html"]
            if not formats:
                raise ConfigError(
                    f"--format html: the page in {RESULTS} is of all tables; give --output, or neither table, profile "
                    "nor --measured"
                )
        if options.runs:
            tables = [table_of_runs(options.runs)]
        else:
            tables = load_tables(options.table, options.measured, options.profile)
        if options.check:
            return check(tables)
    except ConfigError as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    places = Places(options.measured, options.output / "tables", options.output / "figures", overview=everything)
    try:
        written = publish(tables, places, formats)
        changes = update_readme(readme, tables, options.write) if everything else ""
    except ConfigError as error:  # of the blocks that it fills
        print(f"tables.py: {readme}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"tables.py: --output {options.output}: cannot be written ({what})", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    if changes and options.write:
        print(readme)
    elif changes:
        print(f"{changes}README.md is as it was; --write changes it so")
    if options.print or options.runs:
        for table in tables:
            show(table)
    if options.wandb:
        from koala.tables.wandb_log import log_tables

        print(f"W&B run: {log_tables(tables, Path(os.environ.get('WANDB_DIR', 'outputs')))}")
    return 0
