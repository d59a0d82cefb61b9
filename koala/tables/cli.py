"""The command line of scripts/tables.py."""

import argparse
import os
import sys
from pathlib import Path

from koala.errors import ConfigError
from koala.tables.publish import FORMATS, ROOT, Places, load_tables, publish
from koala.tables.terminal import show


def main(arguments: list[str] | None = None) -> int:
    """Renders tables from records; returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="tables.py", description="Render tables and figures from recorded runs; runs nothing."
    )
    parser.add_argument("table", nargs="*", help="e.g. koala/table6; all when none is named")
    parser.add_argument("--profile", help="records of this profile (default: the first that has any)")
    parser.add_argument("--measured", type=Path, default=ROOT / "results" / "measured", help="folder of recorded rows")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="tables/ and figures/ go here")
    parser.add_argument("--format", default=",".join(FORMATS), help=f"some of {','.join(FORMATS)}")
    parser.add_argument(
        "--wandb", action="store_true", help="log tables and figures as one W&B run (offline without a key)"
    )
    parser.add_argument("--print", action="store_true", help="show the tables in the terminal too")
    options = parser.parse_args(arguments)
    try:
        formats = options.format.split(",")
        for format in formats:
            if format not in FORMATS:
                raise ConfigError(f"--format {format}: unknown; valid: {', '.join(FORMATS)}")
        tables = load_tables(options.table, options.measured, options.profile)
    except ConfigError as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    # The overview and the README are of everything at once.
    everything = not options.table and not options.profile and options.output.resolve() == ROOT / "results"
    readme = ROOT / "README.md" if everything else None
    places = Places(options.measured, options.output / "tables", options.output / "figures", readme)
    written = publish(tables, places, formats)
    for path in written:
        print(path)
    if options.print:
        for table in tables:
            show(table)
    if options.wandb:
        from koala.tables.wandb_log import log_tables

        print(f"W&B run: {log_tables(tables, Path(os.environ.get('WANDB_DIR', 'outputs')))}")
    return 0
