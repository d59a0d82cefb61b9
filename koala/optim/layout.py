"""The model as flat lists of local tensors, kept between steps for as long as nothing moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from .distributed import share
from .loss import precision
from .state import Table, make_state

PLAIN = {Tensor, torch.nn.Parameter}


@dataclass
class Bucket:
    """Tensors of one device and dtype, of all parameter groups.

    Attributes:
        columns: their columns in the layout's tables.
        weights: this rank's part of each parameter.
        orders: their dimensions from the slowest to the fastest in memory; None where that is the usual order.
        x: the weights as dense 1-D tensors: views, or copies that stand for weights whose memory is not dense.
        buffers: per-weight state by name, dense 1-D views in the same memory order.
        sharded: any of them is a DTensor.
        grads: this rank's gradients of this step, strided as the weights (and of their dtype), or None.
    """

    columns: slice
    weights: list[Tensor]
    orders: list[list[int] | None]
    x: list[Tensor]
    buffers: dict[str, list[Tensor]]
    sharded: bool
    grads: list[Tensor | None] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.x[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.x[0].dtype

    @cached_property
    def lengths(self) -> list[int]:
        return [t.numel() for t in self.x]

    @cached_property
    def simple(self) -> bool:
        """Nothing is sharded, and all memory is dense."""
        return not self.sharded and addresses(self.x) == addresses(self.weights)

    @cached_property
    def strides(self) -> list[tuple[int, ...]]:
        return [t.stride() for t in self.weights]

    @property
    def g(self) -> list[Tensor | None]:
        """The gradients as 1-D tensors in the memory order of the weights."""
        return [None if g is None else flat(g, order)[0] for g, order in zip(self.grads, self.orders, strict=True)]

    def addresses(self) -> list[list[int]]:
        """Of x, gradients (0: none) and buffers; valid for this step."""
        return [self._x_addresses, self.gradient_addresses, *self._buffer_addresses]

    @property
    def gradient_addresses(self) -> list[int]:
        """Of this step; 0: there is none."""
        try:
            return list(map(Tensor.data_ptr, self.grads))
        except TypeError:
            return [0 if g is None else g.data_ptr() for g in self.grads]

    @cached_property
    def _x_addresses(self) -> list[int]:
        return addresses(self.x)

    @cached_property
    def _buffer_addresses(self) -> list[list[int]]:
        return [addresses(tensors) for tensors in self.buffers.values()]

    def read_gradients(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Raises RuntimeError where a gradient is sparse."""
        if not (self.simple and self._are_like_the_weights(grads)):
            grads = [self._gradient(i, p) for i, p in enumerate(params)]
        self.grads = grads

    def _are_like_the_weights(self, grads: list[Tensor | None]) -> bool:
        try:
            return list(map(Tensor.stride, grads)) == self.strides and {g.dtype for g in grads} == {self.dtype}
        except (AttributeError, TypeError, RuntimeError):  # one is missing or sparse
            return False

    def _gradient(self, i: int, p: Tensor) -> Tensor | None:
        grad, like = p.grad, self.weights[i]
        if grad is None:
            return torch.zeros_like(like) if isinstance(p, DTensor) else None  # others may have a part of it
        if grad.layout != torch.strided:
            raise RuntimeError("sparse gradients are not supported: use dense ones (sparse=False in nn.Embedding)")
        grad = local(grad)
        order, grad = self.orders[i], grad.to(like.dtype)
        if order is None:
            return grad.contiguous()
        return grad.permute(order).contiguous().permute(inverse(order))


class Layout:
    """Every parameter that is trained or has state, one a column of the tables, in buckets.

    Attributes:
        device, dtype: of tables and filter state.
        params: parameters in the order of the columns; ``present``: 1 where there is a gradient in
            this step, ``[columns]``.
        buckets: see :class:`Bucket`.
        group: index of each column's parameter group, on the device; ``groups``: the same as numbers.
        hyper: float64 ``[2, groups]`` on the device, lr and weight decay; ``decays``: of each column, as numbers.
        scalars: per-tensor state ``[scalars, columns]``; ``filter``: filter state. ``optimizer.state`` and the groups
            hold views of them.
        shares: what this rank's products count in the sum over ranks; None where they need no sum.
        frozen: squared norm of what has no column, for KOALA-M's drift.
        numel: number of weights of all parameters, over all ranks.
    """

    def __init__(self, optimizer: Any) -> None:
        self._groups = optimizer.param_groups
        every = [(p, i) for i, group in enumerate(self._groups) for p in group["params"]]
        self._every = [p for p, _ in every]
        self._flags = self._trained()
        places: dict[Any, list[tuple[Tensor, int]]] = {}
        for p, i in every:
            if p.requires_grad or optimizer.state.get(p):
                make_state(optimizer, p)
                places.setdefault((local(p).device, p.dtype), []).append((p, i))
        ordered = [member for members in places.values() for member in members]
        self.params = [p for p, _ in ordered]
        self.groups = [i for _, i in ordered]
        device = next((local(p).device for p in self._every), torch.device("cpu"))
        self.device, self.dtype = device, precision(device)
        self.group = torch.tensor(self.groups, dtype=torch.int64, device=device)
        self.numel = sum(p.numel() for p in self._every)
        self.buckets: list[Bucket] = []
        for members in places.values():
            self.buckets.append(self._bucket(optimizer, [p for p, _ in members]))
        states = [[optimizer.state[p]] for p in self.params]
        self._scalars = Table(optimizer.scalars, states, device, self.dtype)
        self._filter = Table(optimizer.filter_state, [self._groups], device, self.dtype)
        self.scalars, self.filter = self._scalars.values, self._filter.values.squeeze(1)
        self.hyper = torch.zeros(2, len(self._groups), dtype=self.dtype, device=device)
        self._entries = [row.unbind() for row in self.hyper.unbind()]
        self._written: list[list[Any]] = [[None] * len(self._groups) for _ in range(2)]
        self._states = [optimizer.state[p] for p in self.params]
        self._addresses = self._current_addresses()
        world = optimizer.world
        self.sharded = world > 1 and any(isinstance(p, DTensor) for p in self._every)
        self.shares = None
        if self.sharded:
            shares = [share(p, world) for p in self.params]
            self.shares = torch.tensor(shares, dtype=self.dtype, device=device)
        self._frozen = [p for p in self._every if not p.requires_grad and not optimizer.state.get(p)]
        self._frozen_shares = [share(p, world) if self.sharded else 1.0 for p in self._frozen]
        self._frozen_norm: tuple[Any, Tensor] | None = None
        self._present: list[bool] = []
        self.backend: tuple[bool | None, Any] | None = None  # what was asked for, and what it came to
        self.cache: dict[str, Any] = {}  # a backend's own tables

    def _bucket(self, optimizer: Any, params: list[Tensor]) -> Bucket:
        first = sum(len(bucket.x) for bucket in self.buckets)
        columns = slice(first, first + len(params))
        sharded = any(isinstance(p, DTensor) for p in params)
        bucket = Bucket(columns, [], [], [], {name: [] for name in optimizer.buffers}, sharded, [None] * len(params))
        for p in params:
            weights = local(p.detach())
            order = None if weights.is_contiguous() else memory_order(weights)
            bucket.weights.append(weights)
            bucket.orders.append(order)
            bucket.x.append(flat(weights, order)[0])
            for name in optimizer.buffers:
                bucket.buffers[name].append(_flat_buffer(optimizer, p, name, weights, order))
        return bucket

    # ------------------------------------------------------------------ is it still what it was?

    def current(self, optimizer: Any) -> bool:
        """No parameter or state came, went, moved or changed between trained and frozen, as far as addresses tell."""
        every = [p for group in optimizer.param_groups for p in group["params"]]
        return (
            optimizer.param_groups is self._groups
            and len(every) == len(self._every)
            and all(map(is_, every, self._every))
            and self._trained() == self._flags
            and self._filter.current()
            and self._scalars.current()
            and self._current_addresses() == self._addresses
        )

    def _trained(self) -> list[bool]:
        return list(map(attrgetter("requires_grad"), self._every))

    def _current_addresses(self) -> list[int]:
        tensors = list(self.params)
        for name in self.buckets[0].buffers if self.buckets else ():
            tensors += map(itemgetter(name), self._states)
        return addresses(tensors)

    # ------------------------------------------------------------------ what changes from step to step

    def read_gradients(self) -> None:
        grads = list(map(attrgetter("grad"), self.params))
        present = [grad is not None for grad in grads]
        if present != self._present:
            self._present = present
            self.present = torch.tensor(present, dtype=self.dtype, device=self.device)
        for bucket in self.buckets:
            bucket.read_gradients(self.params[bucket.columns], grads[bucket.columns])

    def drop_gradients(self) -> None:
        """So that ``zero_grad`` frees them."""
        for bucket in self.buckets:
            bucket.grads = [None] * len(bucket.x)

    def read_hyper(self) -> None:
        """Learning rates and weight decays onto the device: filled in where a number changed, copied from a tensor."""
        for row, name in enumerate(("lr", "weight_decay")):
            for i, group in enumerate(self._groups):
                value = group[name]
                if isinstance(value, Tensor):
                    self._entries[row][i].copy_(value.detach().reshape(()), non_blocking=True)
                elif value != self._written[row][i]:
                    self._entries[row][i].fill_(value)
                self._written[row][i] = None if isinstance(value, Tensor) else value

    @property
    def decays(self) -> list[float]:
        by_group = [float(group["weight_decay"]) for group in self._groups]
        return [by_group[i] for i in self.groups]

    @property
    def n(self) -> int:
        return len(self.params)

    @property
    def frozen(self) -> Tensor:
        """Summed anew only when a frozen weight changed."""
        parts = [local(p) for p in self._frozen]
        versions = [[p._version for p in parts], addresses(parts)]
        if self._frozen_norm is None or self._frozen_norm[0] != versions:
            total = torch.zeros((), dtype=self.dtype, device=self.device)
            for p, part in zip(parts, self._frozen_shares, strict=True):
                for piece in p.detach().reshape(-1).split(1 << 16):  # no float64 copy of the whole
                    total += part * piece.to(precision(p.device)).square().sum().to(self.device)
            self._frozen_norm = versions, total
        return self._frozen_norm[1]

    def gather(self) -> None:
        """Weights whose memory is not dense into their dense copies."""
        for weights, order, x in self._copies:
            x.copy_(weights.permute(order).reshape(-1))

    def write_back(self) -> None:
        """The dense copies into the weights they stand for."""
        for weights, order, x in self._copies:
            weights.permute(order).copy_(x.view([weights.shape[d] for d in order]))

    @cached_property
    def _copies(self) -> list[tuple[Tensor, list[int], Tensor]]:
        rows = [row for bucket in self.buckets for row in zip(bucket.weights, bucket.orders, bucket.x, strict=True)]
        return [(w, order, x) for w, order, x in rows if order is not None and not w.permute(order).is_contiguous()]


def addresses(tensors: list[Tensor]) -> list[int]:
    """Where they, or this rank's parts of them, are; a fake tensor is nowhere, and stays there."""
    if PLAIN.issuperset(map(type, tensors)):  # hundreds of tensors a step: no Python for each
        return list(map(Tensor.data_ptr, tensors))
    return [0 if isinstance(t, FakeTensor) else t.data_ptr() for t in map(local, tensors)]


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def memory_order(t: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    return sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def flat(t: Tensor, order: list[int] | None) -> tuple[Tensor, bool]:
    """``t`` as 1-D with its dimensions in ``order``, and whether that is a view (else it is a copy)."""
    if order is not None:
        t = t.permute(order)
    return (t.view(-1), True) if t.is_contiguous() else (t.contiguous().view(-1), False)


def _flat_buffer(optimizer: Any, p: Tensor, name: str, weights: Tensor, order: list[int] | None) -> Tensor:
    """Flat view of a buffer, which is laid out anew where it is not as the weights are.

    Raises:
        ValueError: it has another shape.
    """
    state = optimizer.state[p]
    buffer = state[name]
    if buffer.shape != p.shape:
        raise ValueError(
            f"{type(optimizer).__name__}: state {name!r} has shape {tuple(buffer.shape)} and its parameter "
            f"{tuple(p.shape)}: it is the state of another model"
        )
    part = local(buffer)
    if (part.dtype, part.device) == (weights.dtype, weights.device):
        view, viewed = flat(part, order)
        if viewed:
            return view
    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    local(state[name]).copy_(part)
    return flat(local(state[name]), order)[0]
