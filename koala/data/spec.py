"""The keys of an image data set's config (configs/data/*.yaml), typed and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from koala.errors import ConfigError


@dataclass
class ImageSpec:
    """What an image data set is, where it comes from and how its images are prepared.

    With neither ``path`` nor ``hub`` the set is scikit-learn's handwritten digits, which needs no files.
    """

    name: str
    classes: int
    size: int  # images are size x size
    channels: int = 3  # 1 (grey) or 3 (RGB)
    mean: list[float] = field(default_factory=lambda: [0.0])  # of pixel values 0..255, one for each channel
    std: list[float] = field(default_factory=lambda: [255.0])
    path: str | None = None  # folder of <split>*.parquet files, or of <split>/<class>/ folders of images
    hub: str | None = None  # id of a data set on the Hugging Face hub
    hub_revision: str | None = None  # its commit, so that everybody has the same images
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"  # names of the splits; local parquet files begin with them
    test_split: str = "test"
    validation: int = 0  # images carved from train, stratified by class, the same ones for every seed
    crop_padding: int = 0  # training: zero-pad by so many pixels and crop at random
    flip: bool = False  # training: mirror every second image, at random
    cutout: int = 0  # training: side of a square set to the mean colour (arXiv 1708.04552)
    streaming: bool = False  # decode in workers while training instead of holding uint8 images on the device
    workers: int = 8  # processes of each rank that decode, when streaming

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> "ImageSpec":
        """Reads the keys that concern images from ``cfg``; the others (epochs, ...) are the trainer's.

        Raises:
            ConfigError: naming key, value and what is valid.
        """
        known = {item.name: cfg[item.name] for item in fields(cls) if item.name in cfg}
        try:
            spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), known))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None)
            raise ConfigError(f"data.{key}={known.get(key)!r}: {str(error).splitlines()[0]}") from error
        spec._check()
        return spec

    def _check(self) -> None:
        for key, least in {
            "classes": 2,
            "size": 1,
            "validation": 0,
            "crop_padding": 0,
            "cutout": 0,
            "workers": 0,
        }.items():
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}={getattr(self, key)}: must be at least {least}")
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels={self.channels}: valid: 1 (grey), 3 (RGB)")
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, self.channels):
                raise ConfigError(
                    f"data.{key}={getattr(self, key)}: needs {self.channels} values, one for each channel"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"data.std={self.std}: must be positive")
