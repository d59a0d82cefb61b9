"""Data sets: a data config becomes training, validation and test batches on the right device.

>>> data = build(cfg, Loading(seed=1, batch_size=128))
>>> for inputs, targets, start in data.train.epoch(0): ...
"""

import importlib
from collections.abc import Mapping
from typing import Any

from koala.data.base import Batch, Data, EvalSource, Loading, TrainSource
from koala.data.fingerprint import digest, fingerprint
from koala.data.spec import spec_of

__all__ = ["Batch", "Data", "EvalSource", "Loading", "TrainSource", "build", "digest", "fingerprint"]


def build(cfg: Mapping[str, Any], loading: Loading) -> Data:
    """Builds the data set that ``cfg`` (a file of configs/data) describes.

    Raises:
        ConfigError: for a bad key or value, missing or foreign files, or a batch larger than the set.
    """
    spec = spec_of(cfg)
    return importlib.import_module(f"koala.data.{spec.kind}").build(spec, loading)
