"""What the filters share: the two-stage step, the measurement, shared filter state, and the torch.optim contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .loss import Ledger, LossStats
from .tensors import Bucket, local, make_buckets, share

MEASUREMENTS = ("second_moment", "squared_mean", "variance", "variance_of_mean")
SKIP_NORM = 1e-9  # a tensor whose raw gradient is shorter than this is left alone
TINY = torch.finfo(torch.float64).tiny  # keeps 0 / 0 out where noise and covariance both vanish


class KalmanOptimizer(Optimizer):
    """Base class of the filters: ``predict()`` before the forward pass, ``update(loss, loss_var)`` after backward.

    ``step(closure)`` does predict, closure, update, so that trainers and schedulers see an ordinary optimizer.

    A subclass names its per-weight ``buffers``, its per-tensor ``scalars`` and its filter-wide state
    (:meth:`_initial_filter`), and says what happens in :meth:`_predict`, :meth:`_measure`, :meth:`_correct` and
    :meth:`_conclude`. Filter-wide state lives in the parameter groups as float64 0-dim tensors, the same object in
    every group, where ``state_dict`` and ``torch.distributed.checkpoint`` find it.
    """

    buffers: tuple[str, ...] = ()  # per-weight state: shape, dtype and device of the parameter, initially zero
    scalars: tuple[str, ...] = ()  # per-tensor state: float64, 0-dim, initially zero
    partial_sums: tuple[str, ...] = ()  # filter state that under sharding is this rank's part of a sum until the update
    signed: tuple[str, ...] = ()  # hyper-parameters that may be negative
    needs_loss = True
    needs_all_tensors = False  # the correction of a tensor depends on the measurement of the others

    def __init__(
        self, params, defaults: dict[str, Any], *, fused: bool | None = None, process_group: Any = None
    ) -> None:
        for name, value in defaults.items():
            if isinstance(value, (int, float)) and not value >= 0 and name not in (*self.signed, "lower_bound"):
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {value}")
            if name in ("alpha_r", "beta") and value > 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at most 1, got {value}")
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{type(self).__name__}: lr as a tensor must have one element, got shape {lr.shape}")
        if "measurement" in defaults:
            self._check_choice("measurement", defaults["measurement"], MEASUREMENTS)
        defaults = {**defaults, "predicted": False}
        self.fused, self.process_group = fused, process_group
        self.ledger = Ledger()
        self._filter_keys = tuple(self._initial_filter(defaults))
        super().__init__(params, defaults)

    def _check_choice(self, name: str, value: Any, valid: tuple) -> None:
        if value not in valid:
            raise ValueError(f"{type(self).__name__}: {name} must be one of {valid}, got {value!r}")

    # ------------------------------------------------------------------ what a subclass says

    def _initial_filter(self, hyper: dict[str, Any]) -> dict[str, float]:
        """Filter-wide state and its initial values."""
        raise NotImplementedError

    def _predict(self) -> None:
        """Time update of weights and covariance."""

    def _measure(self, bucket: Bucket) -> Tensor:
        """Dot products over each tensor of the bucket, float64 of shape ``[k, tensors]``; they add up over shards."""
        raise NotImplementedError

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor | None) -> None:
        """Measurement update of the bucket's tensors, given what :meth:`_measure` found (reduced over shards)."""
        raise NotImplementedError

    def _correct_fused(self, bucket: Bucket, table: Tensor | None, loss: Tensor | None) -> None:
        """The same in C++, which also measures where there is no table."""
        raise NotImplementedError

    def _begin(self, buckets: list[Bucket], tables: list[Tensor | None]) -> None:
        """Called once R is known and before the first correction, with all tables where they had to be reduced."""

    def _conclude(self) -> None:
        """Measurement update of the filter-wide state, once every tensor is corrected."""

    # ------------------------------------------------------------------ the public step

    @torch._disable_dynamo
    @torch.no_grad()
    def predict(self) -> None:
        """Time update, before the forward pass. A prediction stands until its update: asked again, nothing moves."""
        if self._hyper["predicted"]:
            return
        self._place_filter()
        self._predict()
        self._set_predicted(True)

    @torch._disable_dynamo
    @Optimizer.profile_hook_step
    @torch.no_grad()
    def update(self, loss=None, loss_var=None) -> None:
        """Measurement update, after the backward pass.

        What a rank passes is what that rank saw: losses are reduced over ``process_group`` in here, weighted by their
        counts.

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
        """The filter's state as 0-dim tensors, to be logged."""
        return {key: self._hyper[key] for key in self._filter_keys}

    # ------------------------------------------------------------------ the measurement

    def _returned(self, returned: Any) -> LossStats:
        if isinstance(returned, LossStats):
            return returned
        if not isinstance(returned, (Tensor, float, int)):
            raise ValueError(
                f"{type(self).__name__}.step: the closure must return a loss (scalar or per-sample tensor) or "
                f"LossStats, got {type(returned).__name__}"
            )
        return LossStats.from_losses(torch.as_tensor(returned, device=self._device))

    def _told(self, loss, loss_var) -> LossStats | None:
        """The losses of the coming update: what is passed, or what was observed."""
        if loss is None and self.ledger.empty and self.needs_loss:
            raise ValueError(
                f"{type(self).__name__} was given no loss: pass loss= (and loss_var=) or a closure that returns it, or "
                "call observe(losses) before backward"
            )
        if loss is None:
            return self.ledger.take()
        stats = loss if isinstance(loss, LossStats) else LossStats.from_mean(loss, loss_var, device=self._device)
        self.ledger.clear()
        return stats

    def _observe_noise(self, stats: LossStats) -> None:
        """R_k = alpha_r R_{k-1} + (1 - alpha_r) loss_var, in the chosen reading of loss_var about the lower bound."""
        hyper = self._hyper
        if hyper["r"] is None:
            mean, bound = stats.mean, hyper["lower_bound"]
            reading = {
                "second_moment": lambda: stats.second_moment - 2 * bound * mean + bound**2,
                "squared_mean": lambda: (mean - bound).square(),
                "variance": lambda: stats.variance,
                "variance_of_mean": lambda: torch.zeros_like(mean),
            }[hyper["measurement"]]()
            hyper["R"].mul_(hyper["alpha_r"]).add_(reading, alpha=1 - hyper["alpha_r"])

    # ------------------------------------------------------------------ the update

    def _update(self, stats: LossStats | None) -> None:
        self._opt_called = True  # what torch's schedulers look at
        self.predict()  # unless it has been called
        self._place_filter()
        self._make_state()
        buckets = make_buckets(self)
        sharded = self._sharded
        device = self._device  # of the filter; tensors may be on others
        tables = [self._measure(b).to(device) if sharded or self.needs_all_tensors else None for b in buckets]
        if stats is not None:
            stats = LossStats(stats.sums.to(device))
        stats = stats if self.needs_loss else None
        if self._world > 1 and (stats is not None or sharded):
            stats, tables = self._reduce(stats, buckets, tables)
        if "R" in self._filter_keys:
            self._observe_noise(stats)
        self._begin(buckets, tables)
        loss = None if stats is None else (stats.mean - self._hyper["lower_bound"]).clamp(min=0)
        for bucket, table in zip(buckets, tables, strict=True):
            if self.fused:
                self._correct_fused(bucket, table, loss)
            else:
                self._correct(bucket, self._measure(bucket).to(device) if table is None else table, loss)
            bucket.write_back()
        self._conclude()
        self._set_predicted(False)

    def _reduce(self, stats: LossStats | None, buckets: list[Bucket], tables: list[Tensor | None]):
        """One all-reduce for all that ranks must agree on: loss statistics and the dot products over shards."""
        parts = [] if stats is None else [stats.sums]
        if self._sharded:
            parts += [self._hyper[key] for key in self.partial_sums]
            parts += [table * self._shares(bucket) for bucket, table in zip(buckets, tables, strict=True)]
        packed = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(packed, group=self.process_group)
        lengths = [part.numel() for part in parts]
        parts = [flat.view_as(part) for flat, part in zip(packed.split(lengths), parts, strict=True)]
        if stats is not None:
            stats = LossStats(parts.pop(0))
        if self._sharded:
            for key in self.partial_sums:
                self._hyper[key].copy_(parts.pop(0))
            tables = parts
        return stats, tables

    @property
    def _world(self) -> int:
        """Ranks that losses and products are reduced over."""
        if self.process_group is False or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    @property
    def _sharded(self) -> bool:
        """Ranks hold parts of tensors, so that dot products are to be summed over ranks."""
        return self._world > 1 and any(isinstance(p, DTensor) for p in self._params())

    def _share(self, p: Tensor) -> float:
        """What this rank's part of a dot product counts in the sum over ranks."""
        return share(p, self._world) if self._sharded else 1.0

    def _shares(self, bucket: Bucket) -> Tensor | float:
        if not self._sharded:
            return 1.0
        shares = torch.tensor([share(p, self._world) for p in bucket.params], dtype=torch.float64)
        return shares.to(self._device, non_blocking=True)

    # ------------------------------------------------------------------ filter-wide state in the groups

    @property
    def _hyper(self) -> dict[str, Any]:
        """Hyper-parameters and filter state that all groups share (everything but lr and weight_decay)."""
        return self.param_groups[0]

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._params())

    @property
    def _device(self) -> torch.device:
        return local(next(self._params())).device  # a group may be empty: trainers that decay no bias make such

    def _set_predicted(self, value: bool) -> None:
        for group in self.param_groups:
            group["predicted"] = value

    def _place_filter(self) -> None:
        """Filter state onto the device of the weights, which may have moved since."""
        device = self._device
        for key in self._filter_keys:
            if self._hyper[key].device != device:
                moved = self._hyper[key].to(device, non_blocking=True)
                for group in self.param_groups:
                    group[key] = moved

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. ``lr`` and ``weight_decay`` are its own, everything else belongs to the filter as a whole."""
        for key in self.defaults:
            if key in param_group and key not in ("lr", "weight_decay") and param_group[key] != self.defaults[key]:
                raise ValueError(
                    f"{type(self).__name__}: {key} belongs to the whole filter and cannot differ in a group; "
                    "a group's own are lr and weight_decay"
                )
        for key in ("lr", "weight_decay"):
            if isinstance(value := param_group.get(key, 0.0), (int, float)) and not value >= 0:
                raise ValueError(f"{type(self).__name__}: {key} must not be negative, got {value}")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                raise ValueError(f"{type(self).__name__}: complex parameters are not supported")
        first, group = self.param_groups[0], self.param_groups[-1]
        group["predicted"] = first["predicted"]
        for key, value in self._initial_filter(self.defaults).items():
            group[key] = first[key] if key in first else torch.tensor(float(value), dtype=torch.float64)

    def _make_state(self) -> None:
        """State for every trainable parameter, with or without a gradient: distributed checkpoints ask for it."""
        for p in self._params():
            if p.requires_grad:
                self.state_for(p)

    def state_for(self, p: Tensor) -> dict[str, Tensor]:
        """State of a parameter, made of zeros where there is none."""
        state = self.state[p]
        if not state:
            for name in self.buffers:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            for name in self.scalars:
                state[name] = torch.zeros((), dtype=torch.float64, device=local(p).device)
        return state

    def _only_initialises(self) -> bool:
        """torch.distributed.checkpoint makes the state by a step with zero gradients, every rate zero and no loss."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates) or any(lr != 0 for lr in rates):
            return False
        self._make_state()
        return True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("fused", None), ("process_group", None)):
            self.__dict__.setdefault(name, value)  # not part of a pickle
        self.__dict__.setdefault("ledger", Ledger()).clear()
        self._filter_keys = tuple(self._initial_filter(self.defaults))
        for group in self.param_groups[1:]:  # one object again, after pickling or loading
            for key in self._filter_keys:
                group[key] = self.param_groups[0][key]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the filter's own state keeps its float64 whatever the dtype of the weights.

        Raises:
            ValueError: the state is of another kind of optimizer.
        """
        for group in state_dict["param_groups"]:
            if missing := [key for key in self._filter_keys if key not in group]:
                raise ValueError(f"the loaded state is not of a {type(self).__name__}: its groups have no {missing}")
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(saved, self._params(), strict=True):
            for name in self.scalars:
                if index in state_dict["state"]:
                    value = state_dict["state"][index][name]
                    self.state[p][name] = value.to(device=local(p).device, dtype=torch.float64, copy=True)
