"""Encoded images to pixels; sets are decoded once and kept (koala.data.cache)."""

import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from koala import terminal
from koala.data.encoded import Encoded, encoded
from koala.data.resident import Splits, kept
from koala.data.spec import ImageSpec
from koala.data.splits import stratified
from koala.errors import ConfigError

try:  # a third faster than PIL, to the same pixels; its library fits one version of torch only
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):
    decode_jpeg = None

CHUNK = 1000  # images decoded between two steps of the progress bar
DIGITS_TEST = 360  # of scikit-learn's 1,797 digits; the set has no test split of its own
_FORMAT = 3  # part of every cache's name: raise it when the same files would give other pixels


def decoded(spec: ImageSpec, data_root: Path) -> tuple[Splits, str | None]:
    """Returns {"train", "test"}: uint8 images [N, C, H, W] and int64 labels [N], decoded now or earlier; and the hub's
    commit that they are of, if known.

    Raises:
        ConfigError: the images cannot be had, or ``spec`` says other things of them than they are.
    """
    if not (spec.path or spec.hub):
        return _digits(spec), None

    def make() -> tuple[Splits, int | None]:
        splits = encoded(spec, data_root)
        samples = {split: (_decode(images, spec, split), images.labels) for split, images in splits.items()}
        return samples, splits["train"].classes

    return kept(spec, data_root, (_FORMAT, spec.channels, spec.size), make)


def resized(images: Tensor, size: int) -> Tensor:
    """Resizes uint8 images [N, C, H, W] to ``size`` x ``size``, bilinear and antialiased."""
    if images.shape[-1] == size:
        return images
    result = images.new_empty(*images.shape[:2], size, size)
    for some, into in zip(images.split(CHUNK), result.split(CHUNK), strict=True):
        into.copy_(resize(some, [size, size], antialias=True))
    return result


def _digits(spec: ImageSpec) -> Splits:
    """scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    for key, value in {"classes": 10, "size": 8, "channels": 1}.items():
        if getattr(spec, key) != value:
            raise ConfigError(f"data.{key}", getattr(spec, key), f"the embedded digits have {value}", valid=str(value))
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # ink is 0..16
    labels = torch.from_numpy(bunch.target).long()
    train, test = stratified(labels, DIGITS_TEST, "digits test")
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _decode(source: Encoded, spec: ImageSpec, split: str) -> Tensor:
    """Decodes all images of a split on all cores, uint8 [N, C, size, size]."""
    count = len(source.labels)
    images = torch.empty(count, spec.channels, spec.size, spec.size, dtype=torch.uint8)

    def one(row: int) -> None:
        image = pixels(source, row, spec.channels)
        if image.shape[1:] != images.shape[2:]:
            height, width = image.shape[1:]
            valid = f"images of {spec.size}x{spec.size}, or data.streaming=true, which crops and resizes them"
            raise ConfigError("data.size", spec.size, f"{source.name(row)} is {height}x{width}", valid=valid)
        images[row] = image

    with ThreadPoolExecutor() as pool:
        chunks, console = range(0, count, CHUNK), terminal.console(sys.stderr)
        for first in track(chunks, f"decoding {spec.name} {split}", console=console):
            list(pool.map(one, range(first, min(first + CHUNK, count))))
    return images


def pixels(source: Encoded, row: int, channels: int) -> Tensor:
    """Decodes one image, uint8 [channels, H, W]: colour is converted to grey or grey to colour if need be.

    Raises:
        ConfigError: there is no image, or it cannot be decoded, is larger than any photograph (a decompression bomb),
            or has more than 8 bits a channel, which would be lost without a word.
    """
    content, refusal = source.bytes_of(row), None
    try:
        with Image.open(io.BytesIO(content)) as image:
            if (refusal := _refusal(image)) is None:
                return _pixels(image, content, channels)
    except Exception as error:  # a decoder that is given anything may raise anything
        reason = re.sub(r".*\.cpp:\d+, |<.*> *", "", str(error))  # without the line of somebody's C++, or an address
        raise ConfigError(source.name(row), None, f"cannot be decoded: {type(error).__name__}: {reason}") from error
    raise ConfigError(source.name(row), None, refusal)


def _pixels(image: Image.Image, content: bytes, channels: int) -> Tensor:
    """The image upright, turned as its EXIF orientation says, whichever decoder is installed."""
    turned = image.info.keys() & {"exif", "xmp"}  # perhaps: decoders differ in what they make of these
    if decode_jpeg and not turned and channels == 3 and image.format == "JPEG" and image.mode in ("RGB", "L"):
        return decode_jpeg(content, mode="RGB")
    upright = ImageOps.exif_transpose(image) if turned else image
    array = np.array(upright.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _refusal(image: Image.Image) -> str | None:
    """Why an opened image, of which only the header has been read, is not to be decoded."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        return f"is {image.height}x{image.width}: more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
    layout = f"{image.mode} {image.tile[0].args if image.tile else ''}"
    if image.mode in ("I", "F") or ";16" in layout or ";32" in layout:
        return f"has more than 8 bits a channel ({image.mode}); wanted: 8-bit images"
    return None
