"""What ranks must agree on: shares of products, one all-reduce a step, and whether they train one model at all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORKS = "DDP, FSDP2 (fully_shard), tensor parallelism with DTensor, and their combinations"


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Before somebody has imported their module, which takes half as long as torch, there is
    none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def world_of(group: Any) -> int:
    """Ranks that losses and products are reduced over; 1 for False."""
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def share(p: Tensor, world: int) -> float:
    """What this rank's part of a dot product counts in the sum over all ranks, so that each value counts once.

    Raises:
        NotImplementedError: it has a Partial placement, or the ranks that hold its parts do not divide the group.
    """
    parts = 1
    if is_dtensor(p):
        for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
            if placement.is_partial():
                raise NotImplementedError(
                    "parameters with a Partial placement are not supported: shard or replicate them"
                )
            parts *= 1 if placement.is_replicate() else size
    if world % parts:
        raise NotImplementedError(
            f"a parameter is sharded over {parts} ranks and the process group has {world}: pass a process_group that "
            "holds whole models"
        )
    return parts / world


def refuse_flat(params: list[Tensor]) -> None:
    """Raises NotImplementedError for FSDP1's parameters, whose parts are not parts of tensors."""
    if any(getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter" for p in params):
        raise NotImplementedError(
            f"FSDP1 (FullyShardedDataParallel) gives a rank parts that are not tensors of the model; supported: {WORKS}"
        )


def check_agreement(optimizer: Any, device: torch.device) -> None:
    """Once, at the first step: every rank trains the same tensors, with the same values where they are replicas.

    Raises:
        RuntimeError: on every rank, if they do not (ZeRO-1, pipeline stages, or models that have nothing in common but
            the process group).
    """
    digest = hashlib.sha256(type(optimizer).__name__.encode())
    for group in optimizer.param_groups:
        digest.update(repr(group.get("param_names")).encode())
        for p in group["params"]:
            sharding = (p.placements, p.device_mesh.shape) if is_dtensor(p) else None
            digest.update(repr((tuple(p.shape), p.dtype, p.requires_grad, sharding)).encode())
    plain = [p.detach() for p in chain.from_iterable(g["params"] for g in optimizer.param_groups) if not is_dtensor(p)]
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.contiguous().view(-1).view(integers[p.element_size()]).sum(dtype=torch.int64) for p in plain]
    values = torch.stack([s.to(device) for s in sums]).tolist() if sums else []
    digest.update(repr(values).encode())
    number = torch.tensor([int.from_bytes(digest.digest()[:8], "big", signed=True)], device=device)
    everyone = [torch.empty_like(number) for _ in range(world_of(optimizer.process_group))]
    dist.all_gather(everyone, number, group=optimizer.process_group)
    if any(other.item() != number.item() for other in everyone):
        raise RuntimeError(
            f"{type(optimizer).__name__}: the ranks of the process group do not train the same tensors. One filter "
            f"spans all of them: that works with {WORKS}; not with ZeroRedundancyOptimizer or pipeline stages. Ranks "
            "that train models of their own pass process_group=False; replicas must start from the same weights"
        )


@contextmanager
def over_ranks(optimizer: Any, layout: Any, sums: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The losses' sums and, where weights are sharded, the products' rows over all ranks, in one communication.

    Filter state that is a sum over this rank's parts (``partial_sums``) is the sum over all of them within, and this
    rank's again afterwards, should the update have been skipped.
    """
    if not optimizer.cache.agreed:
        check_agreement(optimizer, layout.device)
        optimizer.cache.agreed = True
    rows, partial = None, []
    if layout.sharded:
        rows = layout.backend.measure(optimizer, layout) * layout.shares
        partial = [optimizer.hyper[name] for name in optimizer.partial_sums]
    before = [value.clone() for value in partial]
    parts = [part for part in (sums, rows, *partial) if part is not None]
    if parts:
        totals = all_reduce(parts, optimizer.process_group)
        sums = None if sums is None else totals.pop(0)
        rows = None if rows is None else totals.pop(0)
        for value, total in zip(partial, totals, strict=True):
            value.copy_(total)
    yield sums, rows
    for value, kept in zip(partial, before, strict=True):
        value.copy_(kept)


def all_reduce(parts: list[Tensor], group: Any) -> list[Tensor]:
    """The sums of several tensors over ranks, in one communication."""
    packed = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(packed, group=group)
    return [flat.view_as(part) for flat, part in zip(packed.split([p.numel() for p in parts]), parts, strict=True)]
