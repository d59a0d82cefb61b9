"""Vision transformers of timm's, drawn or from pretrained weights."""

from pathlib import Path
from typing import Annotated

import timm
from pydantic import Field, model_validator
from torch import nn

from koala.errors import ConfigError, first_line
from koala.models.vision import VisionSpec, Width

WEIGHTS = "model.safetensors"


class ViTSpec(VisionSpec):
    """Dosovitskiy et al., arXiv 2010.11929. ``width``: features; ``layers``: one number, the blocks; ``patch``: side of
    a patch.

    ``pretrained``: weights to start from, of the same sizes: one of timm's on the Hugging Face hub, or a local folder
    with its model.safetensors (or that file); null: drawn. Weights of another resolution have their table of positions
    interpolated. The head starts at zero, as in the paper's fine-tuning.
    """

    layers: Annotated[list[Width], Field(min_length=1, max_length=1)]
    heads: Width
    patch: Width
    pretrained: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ViTSpec":
        if self.width % self.heads:
            raise ConfigError("width", self.width, f"must be a multiple of heads={self.heads}")
        if self.pretrained and self.init != "default":
            raise ConfigError("init", self.init, f"pretrained={self.pretrained} has weights", valid="default")
        return self

    def network(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """timm's network for images of ``channels`` x ``size`` x ``size``."""
        if size % self.patch:
            raise ConfigError("model.patch", self.patch, f"does not divide the images' side, {size}")
        file = pretrained_weights(self.pretrained) if self.pretrained else None
        try:
            model = timm.create_model(
                "vit_base_patch32_224.orig_in21k",  # the entry whose other settings hold; sizes and weights are given
                pretrained=file is not None,
                pretrained_cfg_overlay={"file": str(file)},
                img_size=size,
                patch_size=self.patch,
                embed_dim=self.width,
                depth=self.layers[0],
                num_heads=self.heads,
                in_chans=channels,
                num_classes=num_classes,
            )
        except RuntimeError as error:  # torch's, of weights of other names or sizes
            reason = f"does not fit model.width, layers, heads and patch: {str(error).splitlines()[-1].strip()}"
            raise ConfigError("model.pretrained", self.pretrained, reason) from error
        nn.init.zeros_(model.head.weight)
        return model


def pretrained_weights(source: str) -> Path:
    """Returns the file of the weights: given, in the local folder ``source``, or of that name on the hub.

    Raises:
        ConfigError: it cannot be loaded, or is of a kind that may hold code.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    path = Path(source)
    file = path / WEIGHTS if path.is_dir() else path
    if file.exists() and file.suffix != ".safetensors":
        raise ConfigError("model.pretrained", source, "may hold code", valid=f"a folder with {WEIGHTS}, or that file")
    try:
        return file if file.exists() else Path(hf_hub_download(source, WEIGHTS))
    except (OSError, HFValidationError) as error:
        reason = f"cannot be loaded: {first_line(error)}"
        valid = f"a folder with {WEIGHTS} of that repository, or null, which draws weights"
        raise ConfigError("model.pretrained", source, reason, valid=valid) from error
