"""What the filters share: the public face, and the order of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, distributed
from .layout import Layout
from .loss import Ledger, LossStats
from .state import Known, StatefulOptimizer

MEASUREMENTS = ("second_moment", "squared_mean", "variance", "variance_of_mean")
CHOICES = {
    "measurement": MEASUREMENTS,
    "direction": ("gradient", "l2"),
    "precondition": ("momentum", "gradient"),
    "eps_reading": ("paper", "released"),
}


class KalmanOptimizer(StatefulOptimizer):
    """Base class of the filters: ``predict()`` before the forward pass, ``update(loss, loss_var)`` after backward.

    ``step(closure)`` does predict, closure, update, so that trainers and schedulers see an ordinary optimizer.

    A step is two passes over memory around a few scalars. *Measure* takes the dot products that a subclass names in
    ``products``; :meth:`gains` turns them, the losses and the filter's state into coefficients; *apply* moves weights
    and buffers by them as ``moves`` says. With h = g + weight_decay x::

        x <- x + sum of coefficient * (x, h or buffer),    buffer <- sum of coefficient * (x, h or buffer)

    both from old values. A backend (portable, C++, Triton) does the two passes over a layout, the model as flat lists.
    Filter state lives in the parameter groups as float64 0-dim tensors, the same object in every group, where
    ``state_dict`` and ``torch.distributed.checkpoint`` find it.
    """

    products: tuple[tuple[str, str], ...] = ()  # names of x, g, h or buffers; their rows come after `present`
    moves: dict[str, tuple[str, ...]] = {}  # output: inputs. Its order lets outputs be written one after the other
    decays_anyway: str | None = None  # buffer that is multiplied by its own coefficient where the gate is closed
    constant_names: tuple[str, ...] = ()  # hyper-parameters that gains reads, in the order in which C++ is given them
    signed: tuple[str, ...] = ("lower_bound",)  # hyper-parameters that may be negative
    needs_loss = True

    def __init__(
        self, params, defaults: dict[str, Any], *, fused: bool | None = None, process_group: Any = None
    ) -> None:
        for name, value in defaults.items():
            if isinstance(value, (int, float)) and not value >= 0 and name not in self.signed:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {value}")
            if name in ("alpha_r", "beta") and value > 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at most 1, got {value}")
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{type(self).__name__}: {name} must be one of {CHOICES[name]}, got {value!r}")
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{type(self).__name__}: lr as a tensor must have one element, got shape {lr.shape}")
        self.fused, self.process_group = fused, process_group
        self.ledger = Ledger()
        self.known = Known()
        super().__init__(params, {**defaults, "predicted": False})

    # ------------------------------------------------------------------ what a subclass says

    def gains(self, rows: Tensor, lr: Tensor, decay: Tensor, scalars: Tensor, state: Tensor, sums: Tensor | None):
        """Coefficients of the step, and what becomes of the state. Pure: nothing is written, nothing is read back.

        Args:
            rows: ``[1 + products, n]``: 1 where a tensor has a gradient, then the dot products, over all ranks.
            lr, decay: ``[n]``.
            scalars: per-tensor state, ``[scalars, n]``.
            state: filter state, ``[filter_state]``.
            sums: of the losses, over all ranks (:class:`LossStats`); None where the loss is not needed.

        Returns:
            Coefficients ``[1 + inputs of all moves, n]`` of which the first is the gate, 1 or 0; scalars; filter state.
        """
        raise NotImplementedError

    def _predict(self, go: Tensor) -> None:
        """Time update of weights and covariance, where ``go`` is 1: after a skipped update it is 0."""

    # ------------------------------------------------------------------ the public step

    @torch._disable_dynamo
    @torch.no_grad()
    def predict(self) -> None:
        """Time update, before the forward pass. A prediction stands until its update: asked again, nothing moves."""
        if self.hyper["predicted"]:
            return
        if "go" in self.filter_state:
            self._predict(self.hyper["go"])
        self._set_predicted(True)

    @torch._disable_dynamo
    @Optimizer.profile_hook_step
    @torch.no_grad()
    def update(self, loss=None, loss_var=None) -> None:
        """Measurement update, after the backward pass.

        What a rank passes is what that rank saw: losses are reduced over ``process_group`` in here, weighted by their
        counts. A tensor whose gradient is not finite is skipped like one without; a loss that is not finite skips the
        update. ``diagnostics()["skipped"]`` counts the updates in which either happened.

        Args:
            loss: this rank's losses: their mean L (number or one-element tensor), or :class:`LossStats`. Default:
                what was observed.
            loss_var: mean(l_j^2) of the same losses: the second moment about a target of zero, not a variance.
                Default: L^2, all that is known from a mean.

        Raises:
            ValueError: the loss is missing, or either has more than one element.
        """
        self._update(self._told(loss, loss_var))

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss=None, loss_var=None):
        """Predict, measure, update.

        Args:
            closure: zeroes the gradients, computes the loss at the predicted weights, calls backward and returns what
                this rank saw: a scalar mean loss, a vector of per-sample losses or a :class:`LossStats`. If losses
                were observed, they count instead. If it gives up its batch (no gradient, nothing returned), this is
                no step, and the prediction stands.
            loss, loss_var: as in :meth:`update`, without a closure or with one that returns nothing. Where the
                gradients are there already, call :meth:`predict` before the forward pass if they are to be taken at
                the predicted weights, otherwise it is called here.

        Returns:
            What the closure returned.

        Raises:
            ValueError: no loss is known, or one is passed and another returned.
        """
        if closure is None:
            if loss is None and self.ledger.empty and self._only_initialises():
                return None
            self._update(self._told(loss, loss_var))
            return None
        self.predict()
        with torch.enable_grad():
            returned = closure()
        if returned is None and loss is None and self.ledger.empty and not self._has_gradients():
            return None
        if returned is not None and loss is not None:
            raise ValueError(f"{type(self).__name__}.step takes a loss from its closure or as an argument, not both")
        stats = self.ledger.take() if loss is None else self._told(loss, loss_var)
        if stats is None and self.needs_loss:
            stats = self._returned(returned)
        self._update(stats)
        return returned

    @torch._disable_dynamo
    def observe(self, losses: Tensor | LossStats) -> Tensor:
        """Tell the next update what this rank saw, where the trainer calls ``step()`` without a loss.

        A loss lives as long as its gradient: it counts when backward passes through ``losses``, adds up over
        accumulation steps, and is dropped by the update that used it, by :meth:`zero_grad` and by loading a state. What
        has no graph counts at once, where gradients are recorded.

        Args:
            losses: per-sample losses of any shape, or a scalar mean.

        Returns:
            Their mean, with its graph: what backward is called on.
        """
        return self.ledger.observe(losses)

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the losses that went with the gradients go with them."""
        super().zero_grad(set_to_none)
        self.ledger.clear()

    def diagnostics(self) -> dict[str, Tensor]:
        """The filter's state as 0-dim tensors, to be logged; and its ``gain``, where the filter has one (KOALA's have).

        The gain is that of the last update, of the tensor with the largest gradient: K . h / \\|h\\|^2, what the Kalman
        gain K is along h. Where K is a multiple of h (KOALA-V, KOALA-M's weights) that is the multiple, s / S or
        P11 / S, and with lr times the loss it is the rate of that tensor's step.
        """
        gain = self._gain()
        state = {name: self.hyper[name] for name in self.filter_state if name != "go"}
        return state if gain is None else {**state, "gain": gain}

    def _gain(self) -> Tensor | None:
        """As :meth:`diagnostics` tells it, from what is in the state: no step pays for it."""

    @property
    def backend(self) -> str:
        """What makes the steps: "cpp", "triton" or "portable"."""
        return backends.choose(self, self._current_layout()).name

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters and filter state that all groups share (everything but lr and weight_decay)."""
        return self.param_groups[0]

    # ------------------------------------------------------------------ the measurement

    def _returned(self, returned: Any) -> LossStats:
        if isinstance(returned, LossStats):
            return returned
        if not isinstance(returned, (Tensor, float, int)):
            raise ValueError(
                f"{type(self).__name__}.step: the closure must return a loss (scalar or per-sample tensor) or "
                f"LossStats, got {type(returned).__name__}"
            )
        return LossStats.from_losses(torch.as_tensor(returned, device=self._current_layout().device))

    def _told(self, loss, loss_var) -> LossStats | None:
        """The losses of the coming update: what is passed, or what was observed."""
        if loss is None and self.ledger.empty and self.needs_loss:
            raise ValueError(
                f"{type(self).__name__} was given no loss: pass loss= (and loss_var=) or a closure that returns it, or "
                "call observe(losses) before backward"
            )
        if loss is None:
            return self.ledger.take()
        device = next(self._params()).device
        stats = loss if isinstance(loss, LossStats) else LossStats.from_mean(loss, loss_var, device=device)
        self.ledger.clear()
        return stats

    def _update(self, stats: LossStats | None) -> None:
        self._opt_called = True  # what torch's schedulers look at
        self.predict()  # unless it has been called
        layout = self._current_layout()
        layout.read_gradients()
        layout.read_hyper()
        layout.gather()
        backend = backends.choose(self, layout)
        if self.world > 1 and not self.known.agreed:
            distributed.check_agreement(self, layout.device)
            self.known.agreed = True
        sums = stats.sums.to(layout.device, layout.dtype) if stats is not None and self.needs_loss else None
        rows = backend.measure(self, layout) * layout.shares if layout.sharded else None
        drift = self.hyper.get("drift") if layout.sharded else None  # until here a sum over this rank's parts
        parts = [part for part in (sums, rows, drift) if part is not None]
        if self.world > 1 and parts:
            reduced = iter(distributed.all_reduce(parts, self.process_group))
            sums, rows, total = (None if part is None else next(reduced) for part in (sums, rows, drift))
        own = None if drift is None else drift.clone()
        if drift is not None:
            drift.copy_(total)
        backend.correct(self, layout, sums, rows)
        if drift is not None:  # this rank's part again, should the update have been skipped
            drift.copy_(own)
        layout.write_back()
        layout.drop_gradients()
        self._set_predicted(False)

    def constants(self, layout: Layout) -> list[float]:
        """``constant_names`` as numbers: None is nan, a choice its index, a tuple as many."""
        values: dict[str, Any] = {**self.hyper, "numel": layout.numel}
        found = []
        for name in self.constant_names:
            value = values[name]
            value = CHOICES[name].index(value) if name in CHOICES else value
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            found += [nan if number is None else float(number) for number in numbers]
        return found

    @property
    def world(self) -> int:
        """Ranks that losses and products are reduced over."""
        return distributed.world_of(self.process_group)

    # ------------------------------------------------------------------ groups and state

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._params())

    def _current_layout(self) -> Layout:
        if self.known.layout is None or not self.known.layout.current(self):
            self.known.layout = Layout(self)
        return self.known.layout

    def _set_predicted(self, value: bool) -> None:
        for group in self.param_groups:
            group["predicted"] = value

    def _only_initialises(self) -> bool:
        """torch.distributed.checkpoint makes the state by a step with zero gradients, every rate zero and no loss."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates) or any(lr != 0 for lr in rates):
            return False
        self._current_layout()
        return True
