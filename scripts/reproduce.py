"""Runs the missing cells of published tables, then renders them. See --help and experiments/README.md."""

import sys

from koala.reproduce.cli import main

if __name__ == "__main__":
    sys.exit(main())
