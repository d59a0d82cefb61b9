"""Filter state as tensors: scalars side by side in one table, per-weight buffers, and what a loaded state must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import distributed
from .loss import LossBuffer, precision

PER_GROUP = ("lr", "weight_decay")  # hyper-parameters that may differ between groups


def outside_autograd(method: Callable) -> Callable:
    """Every method that makes or writes tensors has this decorator: it records no graph, and a tensor made within
    ``torch.inference_mode()`` could not be written by later steps."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class Table:
    """0-dim tensors in dictionaries that are, between steps, views of one table.

    The dictionaries (parameter groups, per-parameter state) are what ``state_dict`` and distributed checkpoints see and
    may replace entries of; the table is what a step reads and writes at once.

    Args:
        names: of the rows.
        owners: for each column the dictionaries that hold its scalars (the same ones, where there are several).
        device, dtype: of the table, whose values are taken from the dictionaries.
    """

    def __init__(
        self, names: Sequence[str], owners: Sequence[Sequence[dict]], device: torch.device, dtype: torch.dtype
    ):
        self.values = torch.zeros(len(names), len(owners), dtype=dtype, device=device)
        self.views: list[Tensor] = []  # kept alive: signatures of layouts hold their ids
        if not names or not owners:
            return
        before = [[held[0][name].detach().to(device, dtype).reshape(()) for held in owners] for name in names]
        torch.stack([value for row in before for value in row], out=self.values.view(-1))
        for name, row in zip(names, self.values.unbind(), strict=True):
            for held, view in zip(owners, row.unbind(), strict=True):
                self.views.append(view)
                for dictionary in held:
                    dictionary[name] = view


def make_state(optimizer: Any, p: Tensor) -> None:
    """State of a parameter that is trained, zeros where there is none."""
    if not p.requires_grad or is_lazy(p):  # which has no shape yet
        return
    state = optimizer.state[p]
    for name in optimizer.buffers:
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    part = p.to_local() if distributed.is_dtensor(p) else p
    for name in optimizer.scalars:
        if name not in state:
            state[name] = torch.zeros((), dtype=precision(part.device), device=part.device)


def drop_state(optimizer: Any) -> None:
    """State of parameters that are in no group any more, as when a wrapper put its shards in their place."""
    here = set(optimizer._params())
    for p in [p for p in optimizer.state if p not in here]:
        del optimizer.state[p]


def check_loaded(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """That a state is of this kind of filter and of this model.

    Raises:
        ValueError: it is not; the message says what does not fit.
    """
    name = type(optimizer).__name__
    names = set(optimizer.filter_state)
    every = set(chain(*(cls.filter_state for cls in _subclasses(StatefulOptimizer))))
    for group in state_dict["param_groups"]:
        needed = names - {"go", "skipped", "gain"} or set(optimizer.constant_names)  # those came later
        missing = sorted(needed - group.keys())
        foreign = sorted((every - names) & group.keys())
        if missing or foreign:
            what = f"have no {missing}" if missing else f"have {foreign}"
            raise ValueError(f"the loaded state is not of a {name}: its groups {what}")
    expected = {*optimizer.buffers, *optimizer.scalars}
    for index, p in _saved(optimizer, state_dict):
        state = state_dict["state"].get(index)
        if not state:
            continue
        if state.keys() != expected:
            raise ValueError(
                f"the loaded state is not of a {name}: parameter {index} has {sorted(state)}, not {sorted(expected)}"
            )
        for buffer in optimizer.buffers:
            if state[buffer].shape != p.shape:
                raise ValueError(
                    f"the loaded state is of another model: {buffer!r} of parameter {index} has shape "
                    f"{tuple(state[buffer].shape)}, the parameter {tuple(p.shape)}"
                )


def copy_loaded(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Per-parameter state as it was saved: torch shares its tensors, and casts scalars to the dtype of the weights."""
    for index, p in _saved(optimizer, state_dict):
        state = optimizer.state[p]
        for name, value in state_dict["state"].get(index, {}).items():
            if name in optimizer.scalars:
                device = state[name].device
                state[name] = value.to(device=device, dtype=precision(device), copy=True)
            elif state[name] is value:
                state[name] = value.clone()


def snapshot(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict whose scalars (filter state, scalars of each tensor, rates) further steps do not change."""
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in copies:
            copies[id(value)] = value.detach().clone()
        return copies.get(id(value), value)

    scalars = optimizer.scalars
    state = {
        index: {name: copied(value) if name in scalars else value for name, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    groups = [{name: copied(value) for name, value in group.items()} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def _saved(optimizer: Any, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Index in a state_dict and parameter. Where their numbers differ, torch refuses."""
    return zip(
        chain.from_iterable(group["params"] for group in state_dict["param_groups"]), optimizer._params(), strict=False
    )


def _subclasses(cls: type) -> list[type]:
    return [cls, *chain(*map(_subclasses, cls.__subclasses__()))]


@dataclass
class Cache:
    """What a step need not find out anew. An optimizer has one all its life: wrappers (Lightning's, Fabric's) on which
    attributes would be assigned instead of on the optimizer share it, as they share the loss buffer.

    Attributes:
        layout: how the tensors lie.
        agreed: the ranks have compared what they train.
    """

    layout: Any = None
    agreed: bool = False

    def clear(self) -> None:
        """The tensors have changed."""
        self.layout, self.agreed = None, False


class StatefulOptimizer(Optimizer):
    """An optimizer with state of the whole filter, in float64, beside state per weight and per tensor.

    Filter state lives in the parameter groups as 0-dim tensors, the same object in every group, where ``state_dict``
    and ``torch.distributed.checkpoint`` find it. State per parameter is made with the optimizer, as Adagrad's is:
    ``torch.distributed.checkpoint`` would otherwise make it by a step of its own.
    """

    buffers: tuple[str, ...] = ()  # per-weight state: shape, dtype and device of the parameter, initially zero
    scalars: tuple[str, ...] = ()  # per-tensor state: float64, 0-dim, initially zero
    filter_state: tuple[str, ...] = ()  # of the whole filter
    fused: bool | None
    process_group: Any
    loss_buffer: LossBuffer
    cache: Cache

    def _initial_filter(self) -> dict[str, float]:
        """Filter state and its initial values."""
        raise NotImplementedError

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @outside_autograd
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. ``lr`` and ``weight_decay`` are its own, everything else belongs to the filter."""
        for key in self.defaults:
            if key in param_group and key not in PER_GROUP and param_group[key] != self.defaults[key]:
                raise ValueError(
                    f"{type(self).__name__}: {key} belongs to the whole filter and cannot differ in a group; "
                    "a group's own are lr and weight_decay"
                )
        for key in PER_GROUP:
            if isinstance(value := param_group.get(key, 0.0), (int, float)) and not value >= 0:
                raise ValueError(f"{type(self).__name__}: {key} must not be negative, got {value}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if any(p.is_complex() for p in group["params"]):
                raise ValueError(f"{type(self).__name__}: complex parameters are not supported")
            distributed.refuse_flat(group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        self._complete(group)
        self.cache.clear()

    def _complete(self, group: dict[str, Any]) -> None:
        """Filter state of a group, which is the first group's or as it is at the beginning; state of its parameters."""
        first = self.param_groups[0]
        group["predicted"] = first.get("predicted", False)
        for key, value in self._initial_filter().items():
            group[key] = first[key] if key in first else torch.tensor(float(value), dtype=torch.float64, device="cpu")
        for p in group["params"]:
            make_state(self, p)

    def __getstate__(self) -> dict[str, Any]:
        kept = False if self.process_group is False else None  # a group is of this process
        return {**super().__getstate__(), "fused": self.fused, "process_group": kept}

    @outside_autograd
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("loss_buffer", LossBuffer()).clear()
        self.__dict__.setdefault("cache", Cache()).clear()
        if loaded := self.__dict__.pop("_loading", None):
            copy_loaded(self, loaded)
        for group in self.param_groups:
            for key in self.defaults.keys() - {"differentiable"}:  # torch's own, which its groups do without
                group.setdefault(key, self.defaults[key])  # what a state of an older version lacks
            self._complete(group)  # and one object in all groups again

    @torch._disable_dynamo
    @outside_autograd
    def state_dict(self) -> dict[str, Any]:
        """As torch's. Per-weight buffers are the optimizer's own, as in torch (copy them to keep them); filter state,
        scalars of each tensor and rates are a snapshot, which further steps do not change."""
        drop_state(self)
        for p in self._params():
            make_state(self, p)
        first_hook = self.register_state_dict_post_hook(snapshot, prepend=True)
        try:
            return super().state_dict()
        finally:
            first_hook.remove()

    @torch._disable_dynamo
    @outside_autograd
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor is copied, and the filter's own state keeps its float64 whatever the dtype of
        the weights.

        Raises:
            ValueError: the state (as hooks left it) is of another kind of optimizer or of another model; nothing is
                changed then.
        """

        def check(_optimizer: Optimizer, state: dict[str, Any]) -> None:
            check_loaded(self, state)
            self._loading = state

        last_hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
            self.__dict__.pop("_loading", None)
