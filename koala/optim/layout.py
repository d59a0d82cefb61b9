"""The model as flat lists of local tensors, kept between steps for as long as nothing moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from operator import attrgetter, itemgetter, methodcaller
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .distributed import is_dtensor, share, world_of
from .loss import precision
from .state import Table, drop_state, make_state

PLAIN = {Tensor, torch.nn.Parameter}


@dataclass
class Bucket:
    """Trained tensors of one device and dtype, of all parameter groups.

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

    def __post_init__(self) -> None:
        self.device, self.dtype = self.x[0].device, self.x[0].dtype
        self.lengths = [t.numel() for t in self.x]
        self.strides = [t.stride() for t in self.weights]
        self.simple = not self.sharded and addresses(self.x) == addresses(self.weights)  # and all memory is dense

    @property
    def g(self) -> list[Tensor | None]:
        """The gradients as 1-D tensors in the memory order of the weights."""
        return [None if g is None else flat(g, order)[0] for g, order in zip(self.grads, self.orders, strict=True)]

    @property
    def gradient_addresses(self) -> list[int]:
        """Of this step; 0: there is none."""
        try:
            return list(map(Tensor.data_ptr, self.grads))
        except TypeError:
            return [0 if g is None else g.data_ptr() for g in self.grads]

    def addresses(self) -> list[list[int]]:
        """Of x, gradients and buffers; valid for this step."""
        return [addresses(self.x), self.gradient_addresses, *map(addresses, self.buffers.values())]

    def read_gradients(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Raises RuntimeError where a gradient is sparse."""
        try:
            alike = self.simple and list(map(Tensor.stride, grads)) == self.strides
            alike = alike and set(map(attrgetter("dtype"), grads)) == {self.dtype}
            alike = alike and not any(map(Tensor.is_neg, grads))  # what is to be negated lies otherwise in memory
        except (TypeError, RuntimeError):  # one is missing or sparse
            alike = False
        self.grads = grads if alike else [self._gradient(i, p) for i, p in enumerate(params)]

    def _gradient(self, i: int, p: Tensor) -> Tensor | None:
        grad, like = p.grad, self.weights[i]
        if grad is None:
            return torch.zeros_like(like) if is_dtensor(p) else None  # others may have a part of it
        if grad.layout != torch.strided:
            raise RuntimeError("sparse gradients are not supported: use dense ones (sparse=False in nn.Embedding)")
        grad = local(grad)
        order, grad = self.orders[i], grad.to(like.dtype).resolve_neg()
        if order is None:
            return grad.contiguous()
        return grad.permute(order).contiguous().permute(inverse(order))


class Layout:
    """Every parameter that is trained, one a column of the tables, in buckets.

    Attributes:
        device, dtype: of tables and filter state.
        params: parameters in the order of the columns; ``present``: 1 where there is a gradient in
            this step, ``[columns]``.
        frozen: parameters that are not trained, which have no column.
        buckets: see :class:`Bucket`; ``widths``: their numbers of columns.
        group: index of each column's parameter group, on the device; ``groups``: the same as numbers.
        hyper: float64 ``[2, groups]`` on the device, lr and weight decay; ``decays``: of each column, as numbers.
        scalars: per-tensor state ``[scalars, columns]``; ``filter``: filter state. ``optimizer.state`` and the groups
            hold views of them.
        world: ranks that losses and products are reduced over.
        shares: what this rank's products count in the sum over ranks; None where they need no sum.
        numel: number of weights of all parameters, over all ranks; 1 if there are none, since it divides.
        built_for: its :meth:`signature`. While that stays the same, the layout holds.
        backend: what makes the steps; ``fused``: the choice that it came from; ``cache``: its own tables.
    """

    def __init__(self, optimizer: Any) -> None:
        self._groups = optimizer.param_groups
        self._every = list(optimizer._params())
        drop_state(optimizer)
        by_kind: dict[Any, list[tuple[Tensor, int]]] = {}
        for i, group in enumerate(self._groups):
            for p in group["params"]:
                make_state(optimizer, p)
                if p.requires_grad:
                    by_kind.setdefault((local(p).device, p.dtype), []).append((p, i))
        ordered = [member for members in by_kind.values() for member in members]
        self.params = [p for p, _ in ordered]
        self.groups = [i for _, i in ordered]
        self.frozen = [p for p in self._every if not p.requires_grad]
        device = next((local(p).device for p in self._every), torch.device("cpu"))
        self.device, self.dtype = device, precision(device)
        self.group = torch.tensor(self.groups, dtype=torch.int64, device=device)
        self.n, self.numel = len(self.params), max(1, sum(p.numel() for p in self._every))
        self.buckets: list[Bucket] = []
        for members in by_kind.values():
            self.buckets.append(self._bucket(optimizer, [p for p, _ in members]))
        self.widths = [len(bucket.x) for bucket in self.buckets]
        self._states = [optimizer.state[p] for p in self.params]
        self._scalars = Table(optimizer.scalars, [[state] for state in self._states], device, self.dtype)
        self._filter = Table(optimizer.filter_state, [self._groups], device, self.dtype)
        self.scalars, self.filter = self._scalars.values, self._filter.values.squeeze(1)
        self.hyper = torch.zeros(2, len(self._groups), dtype=self.dtype, device=device)
        self._entries = [row.unbind() for row in self.hyper.unbind()]
        self._written: list[list[Any]] = [[None] * len(self._groups) for _ in range(2)]
        self._present: list[bool] | None = None  # not read yet
        self.world = world_of(optimizer.process_group)
        self.sharded = self.world > 1 and any(is_dtensor(p) for p in self._every)
        self.shares = None
        if self.sharded:
            self.shares = torch.tensor([share(p, self.world) for p in self.params], dtype=self.dtype, device=device)
        self.fused, self.backend, self.cache = None, None, {}
        rows = [row for bucket in self.buckets for row in zip(bucket.weights, bucket.orders, bucket.x, strict=True)]
        self._copies = [(w, o, x) for w, o, x in rows if o is not None and not w.permute(o).is_contiguous()]
        self.tensors = [t for bucket in self.buckets for t in (*bucket.x, *sum(bucket.buffers.values(), []))]
        self.built_for = self.signature(optimizer)

    def _bucket(self, optimizer: Any, params: list[Tensor]) -> Bucket:
        first = sum(len(bucket.x) for bucket in self.buckets)
        columns = slice(first, first + len(params))
        weights = [local(p.detach()) for p in params]
        orders = [None if w.is_contiguous() else memory_order(w) for w in weights]
        buffers = {
            name: [_flat_buffer(optimizer, *row, name) for row in zip(params, weights, orders, strict=True)]
            for name in optimizer.buffers
        }
        x = [flat(w, order)[0] for w, order in zip(weights, orders, strict=True)]
        sharded = any(is_dtensor(p) for p in params)
        return Bucket(columns, weights, orders, x, buffers, sharded, [None] * len(params))

    def signature(self, optimizer: Any) -> list:
        """What a layout depends on: which tensors there are, whether they are trained, and where and how they lie."""
        parts: list = [id(optimizer.param_groups), dist.is_initialized()]
        for group in optimizer.param_groups:
            parts += map(id, group["params"])
            parts += map(attrgetter("requires_grad"), group["params"])
            for name in optimizer.filter_state:
                parts.append(id(group.get(name)))
        tensors = list(self.params)
        for name in optimizer.buffers:
            tensors += map(methodcaller("get", name), self._states)
        for name in optimizer.scalars:
            parts += map(id, map(methodcaller("get", name), self._states))
        parts += [*map(Tensor.size, self.params), *map(Tensor.stride, self.params)]
        return parts + addresses(tensors)

    # ------------------------------------------------------------------ what changes from step to step

    def read(self) -> None:
        """Gradients, rates and decays of this step."""
        grads = list(map(attrgetter("grad"), self.params))
        present = [grad is not None for grad in grads]
        if present != self._present:
            self._present = present
            self.present = torch.tensor(present, dtype=self.dtype, device=self.device)
        for bucket in self.buckets:
            bucket.read_gradients(self.params[bucket.columns], grads[bucket.columns])
        for row, name in enumerate(("lr", "weight_decay")):
            for i, group in enumerate(self._groups):
                value = group[name]
                if isinstance(value, Tensor):
                    self._entries[row][i].copy_(value.detach().reshape(()), non_blocking=True)
                elif value != self._written[row][i]:  # filled in on the device, which takes no copy
                    self._entries[row][i].fill_(value)
                self._written[row][i] = None if isinstance(value, Tensor) else value

    def constants(self, optimizer: Any) -> list[float]:
        """The filter's ``constant_names`` as numbers: None is nan, a choice its index, a tuple several."""
        numbers: list[float] = []
        for name in optimizer.constant_names:
            value = self.numel if name == "numel" else optimizer.hyper[name]
            if name in optimizer.choices:
                value = optimizer.choices[name].index(value)
            numbers += value if isinstance(value, (tuple, list)) else (nan if value is None else float(value),)
        return numbers

    @property
    def decays(self) -> list[float]:
        """Weight decay of each column, as numbers."""
        by_group = list(map(itemgetter("weight_decay"), self._groups))
        return list(map(by_group.__getitem__, self.groups))

    def gather(self) -> None:
        """Weights whose memory is not dense into their dense copies."""
        for weights, order, x in self._copies:
            x.copy_(weights.permute(order).reshape(-1))

    def write_back(self) -> None:
        """The dense copies into the weights they stand for; gradients are let go, so that ``zero_grad`` frees them."""
        for weights, order, x in self._copies:
            weights.permute(order).copy_(x.view([weights.shape[d] for d in order]))
        for bucket in self.buckets:
            bucket.grads = [None] * len(bucket.x)


def addresses(tensors: list[Tensor]) -> list[int]:
    """Where they, or this rank's parts of them, are; a fake tensor is nowhere, and stays there."""
    if PLAIN.issuperset(map(type, tensors)):  # hundreds of tensors a step: no Python for each
        return list(map(Tensor.data_ptr, tensors))
    return [0 if t is None or isinstance(t, FakeTensor) else t.data_ptr() for t in map(local, tensors)]


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return t.to_local() if is_dtensor(t) else t


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


def _flat_buffer(optimizer: Any, p: Tensor, weights: Tensor, order: list[int] | None, name: str) -> Tensor:
    """Flat view of a buffer, which is made anew where it does not lie as the weights do.

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
    if (part.dtype, part.device) == (weights.dtype, weights.device) and not part.is_inference():
        view, viewed = flat(part, order)
        if viewed:
            return view
    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    local(state[name]).copy_(part)
    return flat(local(state[name]), order)[0]
