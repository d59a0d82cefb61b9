"""The optimizers of this package by name: each registers itself in its file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

_REGISTRY: dict[str, OptimizerInfo] = {}


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer: how it is called, what it is, what it costs.

    Attributes:
        name: what the command line and :func:`create_optimizer` call it.
        cls: its class.
        description: one line.
        paper: where it was published.
    """

    name: str
    cls: type[Optimizer]
    description: str
    paper: str

    @property
    def buffers(self) -> int | None:
        """State buffers the size of the network; None where an argument decides."""
        return None if self.cls.buffers is None else len(self.cls.buffers)

    @property
    def observes(self) -> str:
        """What its update is given: the "loss", the "gradient", or "outputs" with their targets."""
        return getattr(self.cls, "observes", "loss" if self.needs_loss else "gradient")

    @property
    def needs_loss(self) -> bool:
        """Its update takes the loss."""
        return self.cls.needs_loss

    @property
    def moves_on_predict(self) -> bool:
        """``predict()`` moves the weights, so it must come before the forward pass."""
        return getattr(self.cls, "moves_on_predict", False)


def register(name: str, description: str, paper: str) -> Callable[[type], type]:
    """Class decorator: the class is an optimizer of this package."""

    def enter(cls: type) -> type:
        _REGISTRY[name] = OptimizerInfo(name, cls, description, paper)
        return cls

    return enter


def list_optimizers() -> list[OptimizerInfo]:
    """Every optimizer of this package."""
    return list(_REGISTRY.values())


def create_optimizer(name: str, params, **hyperparameters: Any) -> Optimizer:
    """Make the optimizer called ``name`` over ``params``, with its constructor's keywords.

    Raises:
        ValueError: no optimizer has that name.
        TypeError: a keyword its constructor does not take; the message lists those it does.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no optimizer is called {name!r}; there are {', '.join(_REGISTRY)}")
    valid = [parameter for parameter in inspect.signature(_REGISTRY[name].cls).parameters if parameter != "params"]
    for keyword in hyperparameters:
        if keyword not in valid:
            raise TypeError(f"{name} has no argument {keyword!r}; it has {', '.join(valid)}")
    return _REGISTRY[name].cls(params, **hyperparameters)
