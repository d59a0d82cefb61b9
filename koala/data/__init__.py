"""Data sets: a data config becomes training, validation and test batches on the right device.

>>> data = build(cfg, seed=1, batch_size=128, eval_batch_size=500, device="cpu", data_root="data")
>>> for inputs, targets, start in data.train.epoch(0): ...
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from koala.data.base import Batch, Data, EvalSource, TrainSource
from koala.data.fingerprint import digest, fingerprint
from koala.data.spec import ImageSpec, schema_of, spec_of

__all__ = ["Batch", "Data", "EvalSource", "TrainSource", "build", "digest", "fingerprint", "schema_of"]


def build(
    cfg: Mapping[str, Any],
    *,
    seed: int,
    batch_size: int,
    eval_batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    data_root: str | Path = "data",
) -> Data:
    """Builds the data set that ``cfg`` (a file of configs/data) describes.

    Args:
        seed: seeds the order of the samples and the augmentation; splits have a fixed seed of their own.
        batch_size: global training batch, over all ranks (images, or columns of text).
        eval_batch_size: each rank's evaluation batch, at most; results do not depend on it.
        rank, world: which part of every global batch to yield.
        device: where the batches are.
        data_root: folder below which decoded data is cached.

    Raises:
        ConfigError: for a bad key or value, missing or foreign files, or a batch larger than the set.
    """
    spec = spec_of(cfg)
    return importlib.import_module("koala.data.images" if isinstance(spec, ImageSpec) else "koala.data.text").build(
        spec,
        seed=seed,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        rank=rank,
        world=world,
        device=torch.device(device),
        data_root=Path(data_root),
    )
