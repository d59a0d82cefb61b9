"""Images decoded once into uint8 tensors, and kept on disk for the next run.

The file is safetensors (it holds tensors and text, so loading runs no code), written beside its place and
then moved there, with a checksum: what is found there is whole or is made again. A lock lets one process of a
machine decode while the others wait.
"""

import io
import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from koala.data.sources import fingerprint, labels_of, rows
from koala.data.spec import ImageSpec
from koala.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Splits = dict[str, tuple[Tensor, Tensor]]
CHUNK = 1000  # images decoded between two steps of the progress bar


def decoded(spec: ImageSpec, data_root: Path) -> Splits:
    """Returns {"train", "test"}: uint8 images [N, C, H, W] and int64 labels [N], decoded now or earlier.

    Raises:
        ConfigError: if the images cannot be had, or are not ``spec.size`` x ``spec.size``.
    """
    file = data_root / f"{spec.name}-{fingerprint(spec)}.safetensors"
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            found = _read(file)
            if found is None:
                found = {split: decode(table, spec, split) for split, table in rows(spec, data_root).items()}
                _write(file, found)
    except OSError as error:
        raise ConfigError(f"data_root={data_root}: cannot keep decoded images there: {error}") from error
    return found


def decode(table: "Dataset", spec: ImageSpec, split: str) -> tuple[Tensor, Tensor]:
    """Decodes a data set's rows into uint8 images [N, C, H, W] and int64 labels [N], on all cores."""
    images = torch.empty(len(table), spec.channels, spec.size, spec.size, dtype=torch.uint8)

    def one(row: dict[str, Any]) -> Tensor:
        image = pixels(row["image"], spec)
        if image.shape[1:] != images.shape[2:]:
            height, width = image.shape[1:]
            raise ConfigError(f"data.size={spec.size}: an image of the {split} split is {height}x{width}")
        return image

    with ThreadPoolExecutor() as pool:
        for first in track(range(0, len(table), CHUNK), f"decoding {spec.name} {split}"):
            chunk = table.select(range(first, min(first + CHUNK, len(table))))
            torch.stack(list(pool.map(one, chunk)), out=images[first : first + len(chunk)])
    return images, labels_of(table)


def pixels(encoded: dict[str, Any], spec: ImageSpec) -> Tensor:
    """Decodes one value of an undecoded HF image column ({"bytes", "path"}) into a uint8 image [C, H, W]."""
    try:
        with Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]) as image:
            array = np.array(image.convert("RGB" if spec.channels == 3 else "L"))
    except (UnidentifiedImageError, OSError) as error:
        source = encoded["path"] or f"data.path={spec.path}, data.hub={spec.hub}"
        raise ConfigError(f"{source}: an image cannot be decoded: {error}") from error
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().reshape(-1).view(np.uint8), total)
    return str(total)


def _write(file: Path, splits: Splits) -> None:
    tensors = {}
    for split, (images, labels) in splits.items():
        tensors |= {f"{split}.images": images, f"{split}.labels": labels}
    partial = file.with_suffix(".partial")  # the lock's holder's: what a killed run left is overwritten
    save_file(tensors, partial, metadata={"crc32": _checksum(tensors)})
    os.replace(partial, file)


def _read(file: Path) -> Splits | None:
    """Returns what the file holds, or None if there is none or it is damaged."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            intact = (stored.metadata() or {}).get("crc32") == _checksum(tensors)
    except SafetensorError as error:
        log.warning("%s is damaged (%s): decoding again", file, error)
        return None
    if not intact:
        log.warning("%s is damaged (its checksum differs): decoding again", file)
        return None
    return {split: (tensors[f"{split}.images"], tensors[f"{split}.labels"]) for split in ("train", "test")}
