"""Runs the missing cells of published tables, then renders them. See --help and experiments/README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

from koala.reproduce.cli import main

if __name__ == "__main__":
    sys.exit(main())
