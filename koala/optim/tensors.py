"""Parameters as flat local tensors: any memory layout and any sharding, seen as 1-D tensors by the filters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass
class Bucket:
    """Tensors of one group, dtype and device that are worked on together.

    Attributes:
        group: their parameter group.
        params: the parameters.
        x: their weights; ``g``: their gradients; ``state[name]``: their buffers (and 0-dim per-tensor scalars).
            Weights, gradients and buffers are 1-D local tensors, entry i of each of the same length and in the
            same memory order.
        copies: weights whose memory is not dense, and the dense copies that stand for them in ``x``.
    """

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def decay(self) -> float:
        return float(self.group["weight_decay"])

    def write_back(self) -> None:
        """Copy the result into weights whose memory is not dense, which were worked on as a dense copy."""
        for weights, flat in self.copies:
            weights.copy_(flat.view_as(weights))


def make_buckets(optimizer, with_gradient: bool = True) -> list[Bucket]:
    """The tensors that have a gradient (or, without ``with_gradient``, those that have state) as flat buckets.

    To be called, and its result used, under ``torch.no_grad()``.

    A sharded parameter without a gradient counts as one with a zero gradient: other ranks may have one, and all must
    agree whether it is skipped.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    buckets: list[Bucket] = []
    for group in optimizer.param_groups:
        places: dict[Any, Bucket] = {}
        for p in group["params"]:
            grad = p.grad
            if with_gradient:
                if grad is None:
                    if not (isinstance(p, DTensor) and p.requires_grad):
                        continue
                    grad = torch.zeros_like(p)
                if grad.layout != torch.strided:
                    raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
            elif not optimizer.state.get(p):
                continue
            state = optimizer.state_for(p)
            weights = local(p)
            order = None if weights.is_contiguous() else _memory_order(weights)
            x, viewed = _flat(weights, order)
            place = (x.device, x.dtype)
            bucket = places.get(place)
            if bucket is None:
                state_lists = {name: [] for name in optimizer.buffers + optimizer.scalars}
                bucket = places[place] = Bucket(group, state=state_lists)
                buckets.append(bucket)
            if not viewed:
                bucket.copies.append((weights.permute(order), x))
            bucket.params.append(p)
            bucket.x.append(x)
            if with_gradient:
                grad = local(grad)
                bucket.g.append(_flat(grad if grad.dtype == x.dtype else grad.to(x.dtype), order)[0])
            for name in optimizer.buffers:
                bucket.state[name].append(_flat_buffer(state, name, weights, order))
            for name in optimizer.scalars:
                bucket.state[name].append(state[name])
    return buckets


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def share(p: Tensor, world: int) -> float:
    """One over the number of ranks that hold the same values, so that a sum over all ranks counts each value once.

    Raises:
        NotImplementedError: the parameter's mesh spans a part of the ranks, or it has a Partial placement.
    """
    if not isinstance(p, DTensor):
        return 1 / world
    if p.device_mesh.size() != world:
        raise NotImplementedError(
            f"a parameter's device mesh has {p.device_mesh.size()} ranks and the default process group has {world}; "
            "meshes over a part of the ranks are not supported"
        )
    copies = 1
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if placement.is_partial():
            raise NotImplementedError("parameters with a Partial placement are not supported")
        copies *= size if placement.is_replicate() else 1
    return 1 / copies


def _memory_order(t: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    return sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))


def _flat(t: Tensor, order: list[int] | None) -> tuple[Tensor, bool]:
    """``t`` as 1-D with its dimensions in ``order``, and whether that is a view (else it is a copy)."""
    if order is not None:
        t = t.permute(order)
    elif t.dim() == 1 and not t.requires_grad:  # most gradients and buffers; a view would cost as much as their step
        return (t, True) if t.is_contiguous() else (t.contiguous(), False)
    return (t.view(-1), True) if t.is_contiguous() else (t.contiguous().view(-1), False)


def _flat_buffer(state: dict[str, Tensor], name: str, weights: Tensor, order: list[int] | None) -> Tensor:
    """Flat view of a buffer, which is laid out anew where the weights' layout is no longer the one it was made for."""
    flat, viewed = _flat(local(state[name]), order)
    if not viewed:
        state[name] = torch.empty_like(weights).copy_(state[name])
        flat, _ = _flat(state[name], order)
    return flat
