"""Models: a model config becomes an nn.Module that fits the data. Weights are initialised from torch's global
RNG."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from koala.errors import ConfigError

__all__ = ["build"]

_DATA_OF = {"vision": "images", "language": "text"}  # a model's kind -> the kind of data that it takes


def build(cfg: Mapping[str, Any], *, kind: str, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Builds the model that ``cfg`` (a file of configs/model) describes, for data of this ``kind`` ("images"
    or "text").

    Images: ``input_shape`` is (C, H, W) with H = W and the model maps images [B, C, H, W] to logits [B,
    num_classes]. Text: ``num_classes`` is the vocabulary's size and the model maps (tokens [B, T], state) to
    (logits [B, T, V], state).

    Raises:
        ConfigError: for a bad key or value, or a model that does not take this kind of data.
    """
    name, model_kind = cfg.get("name"), cfg.get("kind")
    if model_kind not in _DATA_OF:
        raise ConfigError(f"model.kind={model_kind!r} is unknown; valid: {', '.join(_DATA_OF)}")
    if _DATA_OF[model_kind] != kind:
        raise ConfigError(
            f"model={name} is a {model_kind} model and takes {_DATA_OF[model_kind]}, not {kind}"
        )
    if model_kind == "language":
        return importlib.import_module("koala.models.language").build(
            cfg, vocab=num_classes, length=input_shape[0]
        )
    channels, height, width = input_shape
    if height != width:
        raise ConfigError(f"model={name} takes square images, not {height}x{width}")
    return importlib.import_module("koala.models.vision").build(
        cfg, num_classes=num_classes, channels=channels, size=height
    )
