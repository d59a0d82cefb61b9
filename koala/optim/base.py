"""What the filters share: the public face, and the order of a step."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, distributed, portable
from .arguments import documented
from .layout import Layout
from .loss import LossBuffer, LossStats
from .state import Cache, StatefulOptimizer, outside_autograd


class KalmanOptimizer(StatefulOptimizer):
    """Base class of the filters: ``predict()`` before the forward pass, ``update(loss, loss_var)`` after backward.

    ``step(closure)`` does predict, closure, update, so that trainers and schedulers see an ordinary optimizer.

    A step is two passes over memory with a few scalars between them. *Measure* computes the dot products in a
    subclass's ``products``. :meth:`gains` turns them, the losses and the filter's state into coefficients. *Apply*
    moves weights and buffers as ``moves`` defines. With h = g + weight_decay x::

        x <- x + sum of coefficient * (x, h or buffer),    buffer <- sum of coefficient * (x, h or buffer)

    both from old values. A backend (portable, C++, Triton) does the two passes over a layout, the model as flat lists.
    A class that has kernels in C++ and Triton names them in ``kernel``; subclasses that change no part of the step keep
    them.

    Prediction and update move only parameters that require a gradient. A frozen one keeps its
    state, and continues from it when it is trained again.
    """

    products: tuple[tuple[str, str], ...] = ()  # names of x, g, h or buffers; their rows come after `present`
    moves: dict[str, tuple[str, ...]] = {}  # output: inputs. Its order lets outputs be written one after the other
    decays_anyway: str | None = None  # buffer that is multiplied by its own coefficient where the gate is closed
    moves_on_predict = False  # `_predict` moves weights, so it must come before the forward pass
    partial_sums: tuple[str, ...] = ()  # filter state that is, until the update, a sum over this rank's parts
    needs_loss = True
    kernel: str  # fused_cpu_NAME.h and fused_cuda_NAME.py, where there are such
    step_of_kernel: dict[str, Any]  # the parts of the step that they repeat
    choices: dict[str, tuple[str, ...]] = {}  # hyper-parameters that are one of some names
    fractions: tuple[str, ...] = ()  # hyper-parameters that are at most 1
    signed: tuple[str, ...] = ("lower_bound",)  # hyper-parameters that may be negative
    constant_names: tuple[str, ...] = ()  # hyper-parameters that gains reads, in the order in which kernels have them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__doc__ = documented(cls.__doc__) if cls.__doc__ else None
        if "kernel" in vars(cls):
            cls.step_of_kernel = {part: getattr(cls, part) for part in backends.STEP}

    def __init__(self, params, defaults: dict[str, Any], *, fused: bool | None = None, process_group: Any = None):
        name = type(self).__name__
        for key, value in defaults.items():
            if isinstance(value, (int, float)) and not value >= 0 and key not in self.signed:
                raise ValueError(f"{name}: {key} must not be negative, got {value}")
            if key in self.fractions and value > 1:
                raise ValueError(f"{name}: {key} must be at most 1, got {value}")
            if key in self.choices and value not in self.choices[key]:
                raise ValueError(f"{name}: {key} must be one of {self.choices[key]}, got {value!r}")
        if isinstance(lr := defaults["lr"], Tensor) and lr.numel() != 1:
            raise ValueError(f"{name}: lr as a tensor must have one element, got shape {lr.shape}")
        self.fused, self.process_group = fused, process_group
        self.loss_buffer, self.cache = LossBuffer(), Cache()
        super().__init__(params, {**defaults, "predicted": False})

    # ------------------------------------------------------------------ what a subclass brings

    def gains(self, rows: Tensor, lr: Tensor, decay: Tensor, scalars: Tensor, state: Tensor, sums: Tensor | None):
        """Coefficients of the step, and the new state. Pure: nothing is written, nothing is read back.

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

    apply = portable.apply_moves  # a step that is not linear in what `moves` may name is a filter's own

    def _predict(self, go: Tensor) -> None:
        """Time update of the filter's state, where ``go`` is 1: after a skipped update it is 0."""

    def frozen_sum(self, layout: Layout) -> Tensor:
        """What kernels add to the sum that their prediction takes: the part of parameters that are not trained."""
        raise NotImplementedError

    def _gain(self) -> Tensor | None:
        """The gain for :meth:`diagnostics`, from what is in the state: no step pays for it."""

    # ------------------------------------------------------------------ the public step

    @torch._disable_dynamo
    @outside_autograd
    def predict(self) -> None:
        """Time update, before the forward pass. A second call before the update moves nothing.

        A weight without a gradient in the last step is predicted like any other, as published.
        """
        if not self.hyper["predicted"]:
            self._time_update()
            self._set_predicted(True)

    @torch._disable_dynamo
    @Optimizer.profile_hook_step
    @outside_autograd
    def update(self, loss=None, loss_var=None) -> None:
        """Measurement update, after the backward pass.

        Each rank passes the losses of its own samples. They are reduced over ``process_group`` here, weighted by their
        counts. A tensor whose gradient is not finite is skipped like one without; a loss that is not finite skips the
        update. ``diagnostics()["skipped"]`` counts the updates in which either happened.

        Args:
            loss: this rank's losses: their mean L (number or one-element tensor), or :class:`LossStats`. Default:
                the observed ones.
            loss_var: mean(l_j^2) of the same losses: the second moment about a target of zero, not a variance.
                Default: L^2, if only the mean is given.

        Raises:
            ValueError: the loss is missing, or either has more than one element.
        """
        self._update(self._losses(loss, loss_var))

    @torch._disable_dynamo
    @outside_autograd
    def step(self, closure: Callable[[], Any] | None = None, *, loss=None, loss_var=None):
        """Predict, measure, update.

        All ranks of the process group step or none does. One that gives up its batch (it has no gradient and no loss)
        makes a filter of the loss skip the update on every rank, as a loss that is not finite does. In one process, a
        closure that gives up makes this no step. Either way the prediction stands.

        Args:
            closure: zeroes the gradients, computes the loss at the predicted weights, calls backward and returns what
                this rank saw: a scalar mean loss, a vector of per-sample losses or a :class:`LossStats`. If losses
                were observed, they count instead. To give up its batch it returns None and leaves no gradient.
            loss, loss_var: as in :meth:`update`, without a closure or with one that returns nothing. Where the
                gradients are there already, call :meth:`predict` before the forward pass if they are to be taken at
                the predicted weights, otherwise it is called here.

        Returns:
            What the closure returned.

        Raises:
            ValueError: the loss is missing, or one is passed and another returned.
        """
        if closure is None:
            self._update(self._losses(loss, loss_var))
            return None
        self.predict()
        with torch.enable_grad():
            returned = closure()
        if returned is None and loss is None and self._has_nothing() and self.world == 1:
            return None
        self._update(self._losses(loss, loss_var, returned))
        return returned

    @torch._disable_dynamo
    def observe(self, losses: Tensor | LossStats) -> Tensor:
        """Pass the losses of this rank to the next update, for trainers that call ``step()`` without a loss.

        A loss counts when backward passes through ``losses``, and adds up over accumulation steps. The update that
        used it, :meth:`zero_grad` and loading a state drop it. A loss without a graph counts at once, where
        gradients are recorded.

        Args:
            losses: per-sample losses of any shape, or a scalar mean.

        Returns:
            Their mean, with its graph: what backward is called on.
        """
        return self.loss_buffer.observe(losses)

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; drops the losses of these gradients, too."""
        super().zero_grad(set_to_none)
        self.loss_buffer.clear()

    def diagnostics(self) -> dict[str, Tensor]:
        """The filter's state as 0-dim tensors, to be logged; and its ``gain``, where the filter has one (KOALA's have).

        The gain is that of the last update, of the tensor with the largest gradient h: K . h, between 0 and 1, the
        share of the innovation that the step makes up for: 1 - R / S, with S = s h . h + R in KOALA-V.
        """
        gain = self._gain()
        state = {name: self.hyper[name] for name in self.filter_state if name != "go"}
        return state if gain is None else {**state, "gain": gain}

    @property
    @outside_autograd
    def backend(self) -> str:
        """What makes the steps: "cpp", "triton" or "portable"."""
        return self._current_layout().backend.name

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters and filter state that all groups share (everything but lr and weight_decay)."""
        return self.param_groups[0]

    @property
    def world(self) -> int:
        """Ranks that losses and products are reduced over."""
        return distributed.world_of(self.process_group)

    # ------------------------------------------------------------------ the order of a step

    def _update(self, stats: LossStats | None) -> None:
        self._opt_called = True  # which torch's schedulers check
        self.predict()  # unless it has been called
        self._measurement_update(stats)
        self._set_predicted(False)

    def _time_update(self) -> None:
        if not self.moves_on_predict:
            if "go" in self.filter_state:
                self._predict(self.hyper["go"])
            return
        layout = self._current_layout()
        layout.gather()
        layout.backend.predict(self, layout)
        layout.write_back()

    def _measurement_update(self, stats: LossStats | None) -> None:
        layout = self._current_layout()
        layout.read()
        layout.gather()
        sums = stats.sums.to(layout.device, layout.dtype) if stats is not None and self.needs_loss else None
        if layout.world == 1:
            layout.backend.correct(self, layout, sums)
        else:
            with distributed.over_ranks(self, layout, sums) as (sums, rows):
                layout.backend.correct(self, layout, sums, rows)
        layout.write_back()

    def _current_layout(self) -> Layout:
        """Checked before each pass over memory: what moved, came, went, froze or thawed makes a new one."""
        layout = self.cache.layout
        if layout is None or layout.signature(self) != layout.built_for:
            layout = self.cache.layout = Layout(self)
        if layout.backend is None or layout.fused != self.fused:
            layout.fused, layout.backend = self.fused, backends.choose(self, layout)
        return layout

    def _set_predicted(self, value: bool) -> None:
        for group in self.param_groups:
            group["predicted"] = value

    # ------------------------------------------------------------------ the losses of a step

    def _losses(self, loss, loss_var, returned: Any = None) -> LossStats | None:
        """The losses of the coming update: what is passed, what was observed, or what the closure returned."""
        name = type(self).__name__
        if loss is not None:
            if returned is not None:
                raise ValueError(f"{name}.step takes a loss from its closure or as an argument, not both")
            stats = loss if isinstance(loss, LossStats) else LossStats.from_mean(loss, loss_var, device=self._device)
            self.loss_buffer.clear()
            return stats
        gave_up = returned is None and self._has_nothing()
        stats = self.loss_buffer.take()
        if stats is not None or not self.needs_loss:
            return stats
        if gave_up and self.world > 1:  # no rank may be missing in the communication
            return LossStats.from_mean(nan, device=self._device)
        if returned is None:
            raise ValueError(
                f"{name} was given no loss: pass loss= (and loss_var=) or a closure that returns it, or call "
                "observe(losses) before backward"
            )
        if isinstance(returned, LossStats):
            return returned
        if not isinstance(returned, (Tensor, float, int)):
            raise ValueError(
                f"{name}.step: the closure must return a loss (scalar or per-sample tensor) or LossStats, got "
                f"{type(returned).__name__}"
            )
        if isinstance(returned, Tensor):
            return LossStats.from_losses(returned)
        return LossStats.from_mean(returned, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._params()).device

    def _has_nothing(self) -> bool:
        """Neither a gradient nor an observed loss."""
        return self.loss_buffer.empty and all(p.grad is None for p in self._params())
