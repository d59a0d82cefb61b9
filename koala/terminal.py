"""The streams that a person reads: whether it is a person is asked of the stream itself, here and nowhere else.

FORCE_COLOR and its like ask for colours where something else takes them for a terminal; they say nothing about whether
a line can be drawn again, which is what a bar does. A log file gets plain lines whatever is set.
"""

import contextlib
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


class Stream:
    """A text stream that falls silent when what reads it has gone: a pipe's reader, a terminal, a full disk.

    Training is not to end because nobody listens. Everything else that writes there falls silent with it.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes `text`, or nothing."""
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        """Flushes what was written, if that is still of use."""
        self._try(self.stream.flush)

    def _try(self, act, *arguments):
        try:
            return act(*arguments)
        except (OSError, ValueError):  # ValueError: closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())  # for the buffer that is left, and for libraries in C
                os.close(nowhere)
            return None


def protect_streams() -> None:
    """Lets this process continue when its output and errors can no longer be written, or were closed at the start."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file would get this number, and with it what libraries in C print
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Stream):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only
            setattr(sys, name, Stream(stream))
