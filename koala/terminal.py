"""Whether a person watches: asked of the stream itself, here and nowhere else.

FORCE_COLOR and its like ask for colours where something else takes them for a terminal; they say nothing about whether
a line can be drawn again, which is what a bar does. A log file gets plain lines whatever is set.
"""

import os
import sys
from typing import TextIO

from rich.console import Console


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which lines can be drawn again."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def console(stream: TextIO | None = None, **options) -> Console:
    """Rich's console on `stream` (default: standard output) with further `options` of its constructor."""
    stream = stream or sys.stdout
    return Console(file=stream, force_terminal=is_terminal(stream), **options)
