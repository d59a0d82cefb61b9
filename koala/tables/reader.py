"""Reads YAML into typed values, with errors that name the file and the key."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from koala.errors import ConfigError

REQUIRED = object()


class Node:
    """A mapping of a YAML file that knows where it stands; each key is read once, `done` refuses the ones left over."""

    def __init__(self, values: Any, path: Path, at: str = "", name: Any = None):
        self.path, self.at, self.name = path, at, name
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {at or 'the file'} must be a mapping, not {values!r}")
        self.values = dict(values)
        self.known: list[str] = []

    def error(self, key: str, problem: str, valid: Iterable | None = None) -> ConfigError:
        """The error to raise for `key`."""
        where = f"{self.at}.{key}" if self.at else key
        choices = f"; valid: {', '.join(map(str, valid))}" if valid is not None else ""
        return ConfigError(f"{self.path}: {where} {problem}{choices}")

    def has(self, key: str) -> bool:
        """Whether `key` is there and not yet read."""
        return key in self.values

    def done(self) -> None:
        """Refuses keys that nobody read."""
        if self.values:
            key = next(iter(self.values))
            raise self.error(str(key), "is not a key of this place", sorted(self.known))

    def take(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Any:
        """The value of `key`, which must be one of `types` (`kind` in words)."""
        self.known.append(key)
        if key not in self.values:
            if default is REQUIRED:
                raise self.error(key, f"is missing; it must be {kind}")
            return default
        value = self.values.pop(key)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.error(key, f"must be {kind}, not {value!r}")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A string."""
        return self.take(key, default, (str,), "text")

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A number."""
        return self.take(key, default, (int, float), "a number")

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return self.take(key, default, (bool,), "true or false")

    def scalar(self, key: str, default: Any = REQUIRED) -> Any:
        """A string, a number, true or false."""
        return self.take(key, default, (str, int, float, bool), "text or a number")

    def choice(self, key: str, valid: Iterable[str], default: Any = REQUIRED) -> str:
        """One of the words `valid`."""
        value = self.text(key, default)
        if value not in valid:
            raise self.error(key, f"is {value!r}", valid)
        return value

    def strings(self, key: str, default: Any = REQUIRED) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self._list(key, default, (str,), "text"))

    def whole(self, key: str, default: Any = REQUIRED, least: int = 0, most: float = math.inf) -> Any:
        """A whole number from `least` to `most`."""
        value = self.take(key, default, (int,), "a whole number")
        if value is not default and not least <= value <= most:
            raise self.error(key, f"is {value}", [f"{least} ... {most}".removesuffix(" inf")])
        return value

    def seeds(self, key: str) -> tuple[int, ...]:
        """A non-empty list of different whole numbers, none below 0."""
        values = tuple(self._list(key, REQUIRED, (int,), "whole numbers"))
        if not values:
            raise self.error(key, "must have at least one number")
        if min(values) < 0 or len(set(values)) < len(values):
            raise self.error(key, f"must be different numbers, none below 0, not {list(values)}")
        return values

    def _list(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Iterable:
        values = self.take(key, default, (list, tuple), f"a list of {kind}")
        if not all(isinstance(value, types) and not isinstance(value, bool) for value in values):
            raise self.error(key, f"must be a list of {kind}, not {values!r}")
        return values

    def scalars(self, key: str, default: dict) -> dict[str, Any]:
        """A mapping as it stands."""
        return dict(self.take(key, default, (dict,), "a mapping"))

    def grid(self, key: str) -> dict[str, tuple[float, ...]]:
        """An optional mapping of one name to what is tried: at least two different numbers."""
        values = self.scalars(key, {})
        if len(values) > 1:
            raise self.error(key, f"must have one key, the rate that matters most, not {list(values)}")
        for name, points in values.items():
            numbers = isinstance(points, list) and all(type(point) in (int, float) for point in points)
            if not numbers or len(set(points)) < max(2, len(points)):
                raise self.error(
                    f"{key}.{name}",
                    f"must be a list of at least two different numbers, not {points!r} (in YAML 0.001 and 1.0e-3 are "
                    "numbers, 1e-3 is text)",
                )
        return {name: tuple(points) for name, points in values.items()}

    def children(self, key: str, optional: bool = False) -> list["Node"]:
        """The entries of a mapping of mappings, in order; an empty entry is an empty mapping."""
        values = self.take(key, {} if optional else REQUIRED, (dict,), "a mapping")
        if not values and not optional:
            raise self.error(key, "must have at least one entry")
        return [
            Node({} if item is None else item, self.path, self._below(key, name), name) for name, item in values.items()
        ]

    def items(self, key: str) -> list["Node"]:
        """The entries of an optional list of mappings."""
        values = self.take(key, [], (list,), "a list of mappings")
        return [Node(item, self.path, self._below(key, index)) for index, item in enumerate(values)]

    def _below(self, key: str, name: Any) -> str:
        return f"{self.at}.{key}.{name}" if self.at else f"{key}.{name}"


def read_yaml(path: Path, known: Iterable[str] | None = None) -> Node:
    """The mapping in the file `path`, read with YAML's safe loader.

    Raises:
        ConfigError: no such file (the message lists `known` names), not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        choices = f"; valid: {', '.join(known)}" if known is not None else ""
        raise ConfigError(f"{path} does not exist{choices}")
    try:
        return Node(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
