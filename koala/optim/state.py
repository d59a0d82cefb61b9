"""Filter state as tensors: scalars side by side in one table, per-weight buffers, and what a loaded state must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from . import distributed
from .loss import Ledger, precision

OWN = ("lr", "weight_decay")  # what may differ between groups


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
        self._dictionaries: list[dict] = []
        self._names: list[str] = []
        self._views: list[Tensor] = []
        if not names or not owners:
            return
        found = [[own[0][name].detach().to(device, dtype).reshape(()) for own in owners] for name in names]
        torch.stack([value for row in found for value in row], out=self.values.view(-1))
        for name, row in zip(names, self.values.unbind(), strict=True):
            for own, view in zip(owners, row.unbind(), strict=True):
                for dictionary in own:
                    dictionary[name] = view
                    self._dictionaries.append(dictionary)
                    self._names.append(name)
                    self._views.append(view)

    def current(self) -> bool:
        """The dictionaries still hold the views."""
        return all(map(is_, map(dict.get, self._dictionaries, self._names), self._views))


def make_state(optimizer: Any, p: Tensor) -> None:
    """State of a parameter, zeros where there is none."""
    state = optimizer.state[p]
    for name in optimizer.buffers:
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    part = p.to_local() if isinstance(p, DTensor) else p
    for name in optimizer.scalars:
        if name not in state:
            state[name] = torch.zeros((), dtype=precision(part.device), device=part.device)


def check_loaded(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """That a state is of this kind of filter and of this model.

    Raises:
        ValueError: it is not; the message says what does not fit.
    """
    name = type(optimizer).__name__
    own, every = set(optimizer.filter_state), set(chain(*(cls.filter_state for cls in _kinds(StatefulOptimizer))))
    for group in state_dict["param_groups"]:
        needed = own - {"go", "skipped"} or set(optimizer.constant_names)  # those two came later
        missing = sorted(needed - group.keys())
        foreign = sorted((every - own) & group.keys())
        if missing or foreign:
            what = f"have no {missing}" if missing else f"have {foreign}"
            raise ValueError(f"the loaded state is not of a {name}: its groups {what}")
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    expected = {*optimizer.buffers, *optimizer.scalars}
    for index, p in zip(saved, params, strict=False):  # torch says so where their numbers differ
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


def restore_scalars(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Per-tensor scalars as they were saved: torch casts all state to the dtype of the weights."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, p in zip(saved, params, strict=True):
        for name in optimizer.scalars:
            if index in state_dict["state"] and name in optimizer.state[p]:
                value, device = state_dict["state"][index][name], optimizer.state[p][name].device
                optimizer.state[p][name] = value.to(device=device, dtype=precision(device), copy=True)


def _kinds(cls: type) -> list[type]:
    return [cls, *chain(*map(_kinds, cls.__subclasses__()))]


@dataclass
class Known:
    """What was found out about the tensors. An optimizer has one all its life, so that wrappers (Lightning's, Fabric's)
    on which attributes would be assigned instead of on the optimizer share it, as they share the ledger.

    Attributes:
        layout: how they lie.
        agreed: the ranks have compared what they train.
    """

    layout: Any = None
    agreed: bool = False

    def forget(self) -> None:
        """They have changed."""
        self.layout, self.agreed = None, False


class StatefulOptimizer(Optimizer):
    """An optimizer with state of the whole filter, in float64, beside state per weight and per tensor.

    Filter state lives in the parameter groups as 0-dim tensors, the same object in every group, where ``state_dict``
    and ``torch.distributed.checkpoint`` find it.
    """

    buffers: tuple[str, ...] = ()  # per-weight state: shape, dtype and device of the parameter, initially zero
    scalars: tuple[str, ...] = ()  # per-tensor state: float64, 0-dim, initially zero
    filter_state: tuple[str, ...] = ()  # of the whole filter
    fused: bool | None
    process_group: Any
    ledger: Ledger
    known: Known

    def _initial_filter(self) -> dict[str, float]:
        """Filter state and its initial values."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. ``lr`` and ``weight_decay`` are its own, everything else belongs to the filter as a whole."""
        for key in self.defaults:
            if key in param_group and key not in OWN and param_group[key] != self.defaults[key]:
                raise ValueError(
                    f"{type(self).__name__}: {key} belongs to the whole filter and cannot differ in a group; "
                    "a group's own are lr and weight_decay"
                )
        for key in OWN:
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
        self._fill(group)
        self.known.forget()

    def _fill(self, group: dict[str, Any]) -> None:
        """A group's filter state is the first group's, or as it is at the beginning."""
        first = self.param_groups[0]
        group["predicted"] = first.get("predicted", False)
        for key, value in self._initial_filter().items():
            group[key] = first[key] if key in first else torch.tensor(float(value), dtype=torch.float64)

    def __getstate__(self) -> dict[str, Any]:
        kept = False if self.process_group is False else None  # a group is of this process
        return {**super().__getstate__(), "fused": self.fused, "process_group": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("ledger", Ledger()).clear()
        self.__dict__.setdefault("known", Known()).forget()
        for group in self.param_groups:
            for key in self.defaults.keys() - {"differentiable"}:  # torch's own, which its groups do without
                group.setdefault(key, self.defaults[key])  # what a state of an older version lacks
            self._fill(group)  # and one object in all groups again
        if loaded := self.__dict__.pop("_loading", None):
            restore_scalars(self, loaded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the filter's own state keeps its float64 whatever the dtype of the weights.

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
