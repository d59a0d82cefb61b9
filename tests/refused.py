"""What a refusal names, asked by attribute: its words are free to change."""

import contextlib

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
