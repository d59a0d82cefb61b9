"""Filter state as tensors: scalars side by side in one table, per-weight buffers, and what a loaded state must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .loss import precision


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
        self._entries: list[tuple[dict, str, Tensor]] = []
        if not names or not owners:
            return
        found = [[own[0][name].detach().to(device, dtype).reshape(()) for own in owners] for name in names]
        torch.stack([value for row in found for value in row], out=self.values.view(-1))
        for name, row in zip(names, self.values.unbind(), strict=True):
            for own, view in zip(owners, row.unbind(), strict=True):
                for dictionary in own:
                    dictionary[name] = view
                    self._entries.append((dictionary, name, view))

    def current(self) -> bool:
        """The dictionaries still hold the views."""
        return all(dictionary.get(name) is view for dictionary, name, view in self._entries)


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


def check_loaded(optimizer: Any, state_dict: dict[str, Any], every_filter_state: set[str]) -> None:
    """That a state is of this kind of filter and of this model.

    Raises:
        ValueError: it is not; the message says what does not fit.
    """
    name = type(optimizer).__name__
    own = set(optimizer.filter_state)
    for group in state_dict["param_groups"]:
        missing = sorted(own - {"go", "skipped"} - group.keys())  # those two came later
        foreign = sorted((every_filter_state - own) & group.keys())
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
