"""The sharded part of a checkpoint: each rank writes the shards it holds, and reads the pieces it needs of all shards.

torch.distributed.checkpoint finds the pieces when ranks are more or fewer than before. It writes safetensors here,
which cannot hold code: the index of its default format (`.metadata`) is a pickle, and reading a pickle runs it.
"""

import os
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor


def take(state: dict, shards: dict[str, DTensor], name: str = "") -> dict:
    """`state` without its sharded tensors, which go into `shards` by the path that leads to them."""
    kept = {}
    for key, value in state.items():
        if isinstance(value, DTensor):
            shards[f"{name}{key}"] = value
        else:
            kept[key] = take(value, shards, f"{name}{key}/") if isinstance(value, dict) else value
    return kept


def put_back(kept: dict, like: dict, missing: dict[str, Tensor], name: str = "") -> dict:
    """The inverse of `take`: `kept` with those tensors of `like` that it lacks, which also go into `missing`."""
    state = dict(kept)
    for key, value in like.items():
        if key not in kept:
            state[key] = missing[f"{name}{key}"] = value
        elif isinstance(value, dict):
            state[key] = put_back(kept[key], value, missing, f"{name}{key}/")
    return state


def write(folder: Path, shards: dict[str, DTensor], group: dist.ProcessGroup | None = None) -> None:
    """Writes `shards` below `folder`, each rank the part it holds, and flushes them to disk (a collective of `group`).

    Raises:
        OSError: on every rank, when one of them could not.
    """
    writer = dcp.HuggingFaceStorageWriter(os.fspath(folder), save_distributed=True)
    try:
        dcp.save(shards, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _first_failure(error) from None


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors`, sharded or not, from the shards of any number of ranks below `folder` (a collective).

    Raises:
        Exception: of any kind, if the files are not what `write` leaves or lack a tensor.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so is a single process meant
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(os.fspath(folder)))
        except CheckpointException as error:
            raise _first_failure(error) from None


def _first_failure(error: CheckpointException) -> BaseException:
    """What went wrong on one of the ranks, which `CheckpointException`, no Exception, wraps."""
    return next(iter(error.failures.values()))[0]
