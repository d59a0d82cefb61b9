"""The one error that means "the user can fix this"."""

import difflib
import functools
import re
from collections.abc import Iterable

LONGEST = 100  # characters of a value that a message shows
LONGEST_REASON = 200  # and of another library's message
_NOT_AS_TEXT = re.compile(r"|true|false|[-+]?[\d._]+(e[-+]?\d+)?|\s.*|.*\s", re.IGNORECASE)  # what needs quotes


class ConfigError(ValueError):
    """Bad user input, found before any work is done: ``key=value: reason; valid: ...``.

    The command-line doors print it alone, without a traceback, and exit with status 2.

    Args:
        key: as it would be typed, such as ``optim.lr``; or the file, folder or program that is at fault.
        value: what the key was given; None: nothing that can be shown (a YAML null is "null").
        reason: what is wrong, in a few words.
        valid: what would be right: names, of which the closest to a mistyped value or key is offered, or a phrase.
    """

    def __init__(self, key: object, value: object, reason: str, *, valid: Iterable[str] | str = ()):
        self.key, self.value, self.reason = str(key), value, reason
        self.valid = valid if isinstance(valid, str) else tuple(sorted(map(str, valid)))
        super().__init__(self.key, value, reason)  # what a copy in another process is made from

    def __reduce__(self):
        return functools.partial(type(self), valid=self.valid), (self.key, self.value, self.reason)

    def __str__(self) -> str:
        given = "" if self.value is None else f"={shown(self.value)}"
        text = f"{self.key}{given}: {self.reason}" if self.key else self.reason
        if not self.valid or isinstance(self.valid, str):
            return f"{text}; valid: {self.valid}" if self.valid else text
        wrong = self.key.rpartition(".")[2] if self.value is None else str(self.value)
        close = difflib.get_close_matches(wrong.lower(), self.valid, n=1)
        return f"{text}; {f'did you mean {close[0]}? ' if close else ''}valid: {', '.join(self.valid)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to ``LONGEST_REASON`` characters; its type where it has none."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "..."


def shown(value: object) -> str:
    """`value` as it would be typed on a command line, cut to ``LONGEST`` characters."""
    text = str(value)
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str) and _NOT_AS_TEXT.fullmatch(value):
        text = repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
