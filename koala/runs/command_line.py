"""What is typed to train.py, as Hydra reads it."""

import os
import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from koala.errors import ConfigError
from koala.runs import groups, schema
from koala.runs.schema import GROUPS


def command_line(arguments: Sequence[str]) -> list[str]:
    """Arguments of train.py for Hydra: `--optim koala-m` and `--optim=koala-m` are read as `optim=koala-m`."""
    keys, overrides, left = {*schema.Run.model_fields}, [], list(arguments)
    while left:
        text = left.pop(0)
        option, equals, value = text.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name.partition(".")[0] not in keys:
            overrides.append(text)
        elif equals or left and not left[0].startswith("-") and "=" not in left[0]:
            overrides.append(f"{name}={value if equals else left.pop(0)}")
        else:
            raise ConfigError(option, None, "a value is missing", valid=f"{name}=VALUE or {option} VALUE")
    return typed_later(overrides)


def typed_later(overrides: Iterable[str]) -> list[str]:
    """`overrides` with those of keys in groups forced: the schema, not the YAML file, says which keys there are; and
    values that Hydra cannot read, such as /home/josé or ~/data, as the texts or folders in a home that they are.

    Raises:
        ConfigError: a group is set to null, which Hydra refuses without its name.
    """
    overrides, groups_ = list(map(_readable, overrides)), "|".join(GROUPS)
    for text in overrides:
        if nothing := re.fullmatch(rf"({groups_})=(null|)", text):
            raise ConfigError(nothing[1], "null", "one must be chosen", valid=groups.options(nothing[1]))
    return [f"++{text}" if re.match(rf"({groups_})\.[\w.]+=", text) else text for text in overrides]


def _readable(text: str) -> str:
    """The override `text`, with its value quoted where only that lets Hydra read it, or read it as it was typed."""
    key, equals, value = text.partition("=")
    if equals and key.lstrip("+") in groups.text_keys() and not re.search(r"[\\'\"(){}\[\]]", value):
        choices = value.split(",")  # several in a sweep
        return f"{key}={','.join(_as_typed(choice, alone=len(choices) == 1) for choice in choices)}"
    quoted = f"{key}={QuotedString(os.path.expanduser(value), Quote.single).with_quotes()}"
    return quoted if equals and not _is_override(text) and _is_override(quoted) else text


def _as_typed(value: str, alone: bool) -> str:
    """A value of a key that is text, in quotes where Hydra would make a number of it, or cut off its blanks."""
    try:
        read = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        read = None if value != "null" else value
    changed = isinstance(read, bool | int | float) or alone and isinstance(read, str) and read != value
    unreadable = read is None and value not in ("null", "")
    return QuotedString(os.path.expanduser(value), Quote.single).with_quotes() if changed or unreadable else value


def _is_override(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True
