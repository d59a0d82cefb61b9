"""What a refusal names, asked by attribute or as a word of its own: its words are free to change."""

import contextlib
import re

import pytest

from koala.errors import ConfigError

ANY = object()


@contextlib.contextmanager
def refused(key: str, value: object = ANY, valid: object = ANY, mentions: str = ""):
    """The block is refused for ``key``, with this ``value``, offering ``valid``; its reason ``mentions`` a name."""
    with pytest.raises(ConfigError) as caught:
        yield caught
    error = caught.value
    assert error.key == key, error
    assert value is ANY or error.value == value, error
    assert valid is ANY or error.valid == valid, error
    assert mentions in error.reason, error
    assert "\n" not in str(error) and len(str(error)) < 500, error


@contextlib.contextmanager
def rejected(kind: type[Exception], *names: object):
    """The block raises ``kind``, in one line with these arguments and values: of optimizers, which only know torch."""
    with pytest.raises(kind) as caught:
        yield caught
    assert_names(str(caught.value), *names)


def assert_names(text: str, *names: object) -> None:
    """A text, such as what a command prints when it refuses, is one line that has each of these keys and values."""
    (line,) = text.strip().splitlines()
    missing = [name for name in names if not re.search(rf"(?<![\w.-]){re.escape(str(name))}(?!\w)", line)]
    assert not missing, line
