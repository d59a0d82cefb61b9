"""Renders tables and figures from the records there are; runs nothing. See --help and experiments/README.md."""

import sys

from koala.tables.cli import main

if __name__ == "__main__":
    sys.exit(main())
