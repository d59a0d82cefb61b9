"""Whether a row is of the run that its cell asks for: files of experiments and configurations change after a
measurement, and commands have overrides of their own."""

import functools
import json
import math
from typing import Any

from omegaconf import OmegaConf

from koala.errors import ConfigError
from koala.runs.compose import compose
from koala.runs.identity import material

# Said by other marks, or by the machine: ranks are as many as work now, and a folder is a copy of something published.
APART = ("ranks", "precision", "data.tokenizer", "model.pretrained", "model.weights")


def differences(overrides: tuple[str, ...], row: dict) -> list[str]:
    """What the run of `row` was configured as, where `overrides` ask for something else: "epochs = 2 (asked: 12)"."""
    if not {"data", "optim"} <= row["config"].keys():
        return ["a configuration that its record does not say"]
    try:
        asked = _asked(overrides)
    except ConfigError as error:
        return [f"its cell asks for what cannot be run: {error}"]
    had = _flat(material(row["config"]))
    names = [name for name in {**asked, **had} if not name.startswith(APART)]
    return [
        f"{name} = {json.dumps(had.get(name))} (asked: {json.dumps(asked.get(name))})"
        for name in names
        if not _same(had.get(name), asked.get(name))
    ]


@functools.cache
def _asked(overrides: tuple[str, ...]) -> dict[str, Any]:
    return _flat(json.loads(json.dumps(material(OmegaConf.to_container(compose(overrides))))))


def _flat(config: dict, within: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{within}{key}.") if isinstance(value, dict) else {f"{within}{key}": value}
    return found


def _same(one: Any, other: Any) -> bool:
    infinite = isinstance(other, float) and not math.isfinite(other)
    return one == other or one is None and infinite  # a record has no word for infinity
