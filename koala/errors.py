"""The one error that means "the user can fix this"."""

import difflib
import re
from collections.abc import Iterable

LONGEST = 100  # characters of a value that a message shows
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

    def __init__(
        self, key: object, value: object = None, reason: str | None = None, *, valid: Iterable[str] | str = ()
    ):
        if reason is None:  # the whole message in one: of rooms that are not converted yet
            key, reason = "", str(key)
        self.key, self.value, self.reason = str(key), value, reason
        self.valid = valid if isinstance(valid, str) else tuple(sorted(map(str, valid)))
        super().__init__(self.key, value, reason)  # what a copy in another process is made from

    def __reduce__(self):
        return _again, (type(self), self.key, self.value, self.reason, self.valid)

    def __str__(self) -> str:
        given = "" if self.value is None else f"={shown(self.value)}"
        text = f"{self.key}{given}: {self.reason}" if self.key else self.reason
        if not self.valid:
            return text
        if isinstance(self.valid, str):
            return f"{text}; valid: {self.valid}"
        return f"{text}; {valid(self.key.rpartition('.')[2] if self.value is None else str(self.value), self.valid)}"


def _again(kind: type[ConfigError], key: str, value: object, reason: str, valid: tuple[str, ...] | str) -> ConfigError:
    return kind(key, value, reason, valid=valid)


def valid(name: str, names: Iterable[str]) -> str:
    """The valid names in words, and the one that was probably meant."""
    names = sorted(map(str, names))
    close = difflib.get_close_matches(str(name), names, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"valid: {', '.join(names)}"


def shown(value: object) -> str:
    """`value` as it would be typed on a command line, cut to ``LONGEST`` characters."""
    text = str(value)
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str) and _NOT_AS_TEXT.fullmatch(value):
        text = repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
