"""Renders tables and figures from the records there are; runs nothing. See --help and experiments/README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

from koala.tables.cli import main

if __name__ == "__main__":
    sys.exit(main())
