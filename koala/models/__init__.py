"""Models: a model config becomes an nn.Module that fits the data. Weights are initialised from torch's global
RNG."""

import pkgutil
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from koala.errors import ConfigError
from koala.run_keys import PRETRAINED
from koala.schema import Schema, check

__all__ = ["build", "schema_of", "untrained"]

# A model's kind -> the kind of data that it takes.
_DATA_OF = {"vision": "images", "gan": "images", "text-classification": "sentences", "language": "text"}
# By kind, the key that says which network it is, and the class of each value of it: a schema that builds its network.
# Modules are below koala, and imported when needed.
_SCHEMAS = {
    "vision": ("family", {
        "resnet": "models.vision:ResNetSpec",
        "densenet": "models.vision:DenseNetSpec",
        "mobilenetv3": "models.vision:MobileNetV3Spec",
        "mobilenetv3-released": "extras.released:MobileNetV3ReleasedSpec",
        "swin": "models.vision:SwinSpec",
        "swin-released": "extras.released:SwinReleasedSpec",
        "vgg": "models.vision:VGGSpec",
        "vit": "models.vit:ViTSpec",
        "mlp": "models.vision:MLPSpec",
        "lora": "models.lora:LoRASpec",
    }),
    "text-classification": ("family", {
        "roberta": "models.roberta:RobertaSpec",
        "lora": "models.lora:LoRASpec",
    }),
    "language": ("arch", {
        "lstm": "models.language:LSTMSpec",
        "transformer": "models.language:TransformerSpec",
        "gpt1": "models.language:GPT1Spec",
        "gpt1-released": "extras.gpt1:GPT1ReleasedSpec",
        "gpt": "models.gpt:GPTSpec",
        "awd-lstm": "models.awd_lstm:AWDLSTMSpec",
    }),
    "gan": ("arch", {"dcgan": "extras.dcgan:DCGANSpec"}),
}  # fmt: skip


def schema_of(cfg: Mapping[str, Any]) -> type[Schema]:
    """Returns the schema of a file of configs/model: its keys, their types, ranges and defaults.

    Raises:
        ConfigError: there is no model of this kind, family or architecture.
    """
    kind = str(cfg.get("kind", "null"))
    if kind not in _SCHEMAS:
        raise ConfigError("model.kind", kind, "unknown", valid=_SCHEMAS)
    key, classes = _SCHEMAS[kind]
    network = str(cfg.get(key, "null"))
    if network not in classes:
        raise ConfigError(f"model.{key}", network, "unknown", valid=classes)
    return pkgutil.resolve_name(f"koala.{classes[network]}")


def untrained(cfg: DictConfig) -> dict[str, Any]:
    """Returns a file of configs/model without the weights to start from, so that building it downloads nothing."""
    cfg = cfg.copy()
    for key in PRETRAINED:
        if OmegaConf.select(cfg, key):
            OmegaConf.update(cfg, key, None)
    return OmegaConf.to_container(cfg)


def build(
    cfg: Mapping[str, Any], *, kind: str, num_classes: int, input_shape: tuple[int, ...], vocabulary: int = 0
) -> nn.Module:
    """Builds the model that ``cfg`` (a file of configs/model) describes, for data of this ``kind`` ("images",
    "sentences" or "text").

    Images: ``input_shape`` is (C, H, W) with H = W and the model maps images [B, C, H, W] to logits [B,
    num_classes]. Sentences: ``input_shape`` is (T,), tokens are below ``vocabulary``, and the model maps tokens [B, T],
    negative where there is none, to logits [B, num_classes]. Text: ``num_classes`` is the vocabulary's size and the
    model maps (tokens [B, T], state) to (logits [B, T, V], state).

    Raises:
        ConfigError: for a bad key or value, or a model that does not take this kind of data.
    """
    spec, name, valid_kind = check(schema_of(cfg), cfg, "model."), cfg.get("name"), _DATA_OF[cfg["kind"]]
    if kind != valid_kind:
        raise ConfigError("model", name, f"is a {cfg['kind']} model and takes {valid_kind}, not {kind}")
    if kind == "text":
        return spec.build(vocab=num_classes, length=input_shape[0])
    if kind == "sentences":
        return spec.build(num_classes=num_classes, length=input_shape[0], vocabulary=vocabulary)
    channels, height, width = input_shape
    if height != width:
        raise ConfigError("model", name, f"takes square images, not {height}x{width}")
    return spec.build(num_classes=num_classes, channels=channels, size=height)
