"""Parameters as flat local tensors: any layout, any sharding, seen as 1-D tensors by the filters' arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass
class Bucket:
    """Tensors of one group, dtype and device that are corrected together.

    ``x``, ``g`` and every list in ``state`` hold 1-D local tensors, entry i of length n_i, in the same memory order.
    """

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def decay(self) -> float:
        return self.group["weight_decay"]

    def write_back(self) -> None:
        """Copy the result into weights whose memory is not dense (they were worked on as a dense copy)."""
        for weights, flat in self.copies:
            weights.copy_(flat.view_as(weights))


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def is_sharded(p: Tensor) -> bool:
    return isinstance(p, DTensor)


def shard_weight(p: Tensor, world: int) -> float:
    """One over the number of ranks that hold the same values, so that a sum over all ranks counts each once."""
    if not isinstance(p, DTensor):
        return 1 / world
    if p.device_mesh.size() != world:
        raise NotImplementedError(
            f"a parameter's device mesh has {p.device_mesh.size()} ranks and the default process group {world}; "
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
    """1-D view of ``t`` with its dimensions in ``order``, or a copy where there is no view; and whether it is one."""
    if order is not None:
        t = t.permute(order)
    return (t.view(-1), True) if t.is_contiguous() else (t.contiguous().view(-1), False)


def flat_weights(p: Tensor) -> tuple[Tensor, list[int] | None, Tensor | None]:
    """This rank's weights as a 1-D tensor, the order of their dimensions, and what to copy it to if it is a copy."""
    weights = local(p.detach())
    order = None if weights.is_contiguous() else _memory_order(weights)
    x, viewed = _flat(weights, order)
    return x, order, None if viewed else weights.permute(order)


def make_buckets(optimizer) -> list[Bucket]:
    """The tensors that have a gradient (under sharding: that may have one on some rank), as flat buckets."""
    buckets: dict[Any, Bucket] = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                if not (is_sharded(p) and p.requires_grad):
                    continue
                grad = torch.zeros_like(p)  # another rank may have one: the ranks decide together
            if grad.layout != torch.strided:
                raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
            state = optimizer.state_for(p)
            weights, grad = local(p.detach()), local(grad)
            bucket = buckets.setdefault((index, weights.device, weights.dtype), Bucket(group))
            x, order, original = flat_weights(p)
            if original is not None:
                bucket.copies.append((original, x))
            bucket.params.append(p)
            bucket.x.append(x)
            bucket.g.append(_flat(grad.to(x.dtype), order)[0])
            for name in optimizer.buffers:
                bucket.state.setdefault(name, []).append(flat_buffer(state, name, weights, order))
            for name in optimizer.scalars:
                bucket.state.setdefault(name, []).append(state[name])
    return list(buckets.values())


def flat_buffer(state: dict[str, Tensor], name: str, weights: Tensor, order: list[int] | None) -> Tensor:
    """Flat view of a buffer, laid out anew where the weights' layout changed since it was made."""
    flat, viewed = _flat(local(state[name]), order)
    if not viewed:
        buffer = torch.empty_like(weights, memory_format=torch.preserve_format).copy_(local(state[name]))
        state[name] = buffer
        flat, _ = _flat(buffer, order)
    return flat


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a.b of two 1-D tensors as a float64 scalar; half precision is accumulated in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        a, b = a.float(), b.float()
    return torch.dot(a, b).double()
