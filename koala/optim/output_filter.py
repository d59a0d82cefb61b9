"""What the filters that observe a network's outputs share: the face, what is refused, the state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import measurement
from .jacobian import jacobian
from .loss import precision
from .measurement import Measurement
from .state import drop_state, outside_autograd

CHOICES = {
    "likelihood": ("gaussian", "categorical"),
    "covariance": ("fully_decoupled", "variational"),
    "noise": ("residual", "innovation", "isotropic"),
    "residual": ("prior", "posterior"),
    "batch_rule": ("exact", "deepmd"),
}


class OutputFilter(Optimizer):
    """Base class of the extended Kalman filters: ``predict()`` before the forward pass, ``update(outputs, targets)``
    after it, without a backward pass in between. ``step(closure)`` does both; its closure returns outputs and targets.

    The filter takes the Jacobian of the outputs itself, so that loss, ``zero_grad`` and gradient clipping have no part
    in a step. A batch is one measurement of B C numbers. It costs as many backward passes, of the whole batch each:
    batches are small here, and of one sample in the online setting. The Jacobian takes B C floats a weight while a step
    lasts.

    State is tensors: covariances in ``state``, in the dtype of the weights; scalars of the filter as float64 in the
    first parameter group. Both follow the weights where these are moved or cast. A weight that is frozen keeps its
    state; one that is thawed later gets it then. A measurement that is not finite, or without a sample, is skipped; the
    prediction stands then.
    """

    buffers: tuple[str, ...] | None = None  # state the size of the network; None where an argument decides
    observes = "outputs"
    needs_loss = False
    group_keys: tuple[str, ...] = ()  # hyper-parameters that parameter groups may differ in
    _step_supports_amp_scaling = True  # so that a GradScaler comes as far as to be refused

    @outside_autograd
    def __init__(self, params, defaults: dict[str, Any]) -> None:
        self._check_values(defaults)
        super().__init__(params, {**defaults, "predicted": False})
        device = next(self._params()).device
        for name in ("updates", "skipped", "nis"):
            self.hyper[name] = torch.zeros((), dtype=precision(device), device=device)

    # ------------------------------------------------------------------ what a subclass says

    def _make_state(self, group: dict[str, Any]) -> None:
        """Covariances of the trainable parameters of a group that have none."""
        raise NotImplementedError

    def _expected(self, group: dict[str, Any], params: list[Tensor], held: list[int]) -> Iterator[tuple[int, str, Any]]:
        """Index in ``params``, name and shape of each covariance where the saved ``group`` has state for ``held``."""
        raise NotImplementedError

    def _predict(self) -> None:
        """Time update of weights and covariances."""
        raise NotImplementedError

    def _spread(self, rows: list[Tensor | None]) -> Tensor:
        """H P H^T, [M, M], of the Jacobian's rows, one [M, numel] a parameter; the rows may be overwritten."""
        raise NotImplementedError

    def _correct(self, rows: list[Tensor | None], factor: Tensor, white: Tensor, noise: Tensor) -> None:
        """Measurement update of weights and covariances.

        Args:
            rows: as :meth:`_spread` left them.
            factor: Cholesky factor of S = H P H^T + R, [M, M].
            white: factor^-1 times the errors, [M, 1].
            noise: R of each sample, [B, C, C].
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ the public step

    @outside_autograd
    def predict(self) -> None:
        """Time update, before the forward pass. A second call before the update moves nothing."""
        if not self.hyper["predicted"]:
            self._settle()
            self._predict()
            self.hyper["predicted"] = True

    @outside_autograd
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Measurement update, after the forward pass.

        Args:
            outputs: [B, C] with their graph; logits where the likelihood is categorical.
            targets: [B, C] numbers (gaussian), or [B] class indices, -100 to leave a sample out (categorical).

        Raises:
            ValueError: shapes that do not fit, outputs without a graph or that mix samples, an unknown class.
            RuntimeError: the weights were not predicted before the forward pass, where gamma moves them.
            NotImplementedError: in a process group of several ranks.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise NotImplementedError(f"{self._name} works in one process; several ranks hold parts of its measurement")
        measurement.check(outputs, targets, self.hyper["likelihood"], self._name)
        if not self.hyper["predicted"] and any(group.get("gamma", 1.0) != 1.0 for group in self.param_groups):
            raise RuntimeError(f"{self._name}: gamma moves the weights: call predict() before the forward pass")
        self.predict()
        seen = self._measure(outputs, targets)
        if not seen.error.isfinite().all() or not len(seen.error):
            self.hyper["skipped"] = self.hyper["skipped"] + 1  # not in place: a kept state_dict has the old one
            return
        count, size = seen.error.shape
        rows = jacobian(seen.observed, list(self._trained()), self.hyper["chunk_size"])
        if all(part is None for part in rows):
            raise ValueError(f"{self._name}: the outputs do not depend on any of its weights")

        spread = self._spread(rows)
        S = spread.clone()
        S.view(count, size, count, size).diagonal(dim1=0, dim2=2).add_(seen.noise.permute(1, 2, 0))
        factor, failed = torch.linalg.cholesky_ex(S)
        white = torch.linalg.solve_triangular(factor, seen.error.reshape(-1, 1), upper=False)
        if failed or not white.isfinite().all():
            self.hyper["skipped"] = self.hyper["skipped"] + 1
            return
        self._correct(rows, factor, white, seen.noise)
        self.hyper["predicted"] = False
        self.hyper["updates"] = self.hyper["updates"] + 1
        self.hyper["nis"] = white.square().mean()
        if self.hyper["r"] is None:
            solved = torch.linalg.solve_triangular(factor.mT, white, upper=True)
            self.hyper["R"] = measurement.followed(self.hyper, seen, spread, solved)

    @outside_autograd
    def step(self, closure: Callable[[], tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Tensor]:
        """Predict, forward pass, update.

        Args:
            closure: computes the outputs at the predicted weights and returns them with the targets, as :meth:`update`
                takes them. It calls no backward.

        Returns:
            What the closure returned.

        Raises:
            ValueError: there is no closure, or it returned anything else; and as :meth:`update`.
            RuntimeError: a GradScaler calls.
        """
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(f"{self._name}: outputs have no loss to scale; use bf16 autocast without a GradScaler")
        if closure is None:
            raise ValueError(f"{self._name}.step needs a closure that returns (outputs, targets)")
        self.predict()
        with torch.enable_grad():
            returned = closure()
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor)):
            raise ValueError(
                f"{self._name}.step: the closure must return (outputs, targets), got {type(returned).__name__}"
            )
        self.update(*returned)
        return returned

    def diagnostics(self) -> dict[str, Tensor]:
        """The filter's state as 0-dim tensors, to be logged.

        ``nis``: the mean square of the last innovations in units of S (normalised innovation squared): 1 where the
        variances are right, above 1 where they are too small. ``p``: the mean variance of a weight. ``R``: the
        mean variance of the noise, where it is estimated. ``skipped``: how many updates were skipped.
        """
        followed = {"R": self.hyper["R"].diagonal().mean()} if "R" in self.hyper else {}
        return {"nis": self.hyper["nis"], "p": self._mean_variance(), "skipped": self.hyper["skipped"], **followed}

    def _mean_variance(self) -> Tensor:
        raise NotImplementedError

    @property
    def hyper(self) -> dict[str, Any]:
        """The first parameter group: hyper-parameters that all share, and the filter's scalars."""
        return self.param_groups[0]

    def _measure(self, outputs: Tensor, targets: Tensor) -> Measurement:
        return measurement.measure(outputs, targets, self.hyper)

    # ------------------------------------------------------------------ what is refused

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_values(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{self._name}: {name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < float("inf"):
                raise ValueError(f"{self._name}: {name} must be a finite number of at least 0, got {value}")
            if name in ("chunk_size", "block_size") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{self._name}: {name} must be a whole number above 0, got {value}")
            if name in ("gamma", "robust", "r0") and value == 0:
                raise ValueError(f"{self._name}: {name} must be above 0, got {value}")
            if name == "beta" and value is not None and value >= 1:
                raise ValueError(f"{self._name}: beta must be below 1, got {value}")
        if values.get("likelihood") == "gaussian" and values["r"] == 0:
            raise ValueError(f"{self._name}: r=0: gaussian outputs have noise; valid: a number above 0, or None")

    def _check_dtypes(self, params: Iterable[Tensor]) -> None:
        for p in params:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{self._name}: weights must be float32 or float64 (autocast may compute in less), got {p.dtype}"
                )

    # ------------------------------------------------------------------ groups and state

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _trained(self) -> Iterator[Tensor]:
        """The parameters that are estimated now, in order."""
        return (p for p in self._params() if p.requires_grad and p in self.state)

    def _settle(self) -> None:
        """State of the parameters as they are now: which there are and are trained, their device and dtype."""
        drop_state(self)
        for group in self.param_groups:
            self._check_dtypes(group["params"])
            self._make_state(group)
        for p in self._params():
            state = self.state.get(p, {})
            for name, value in state.items():
                if (value.device, value.dtype) != (p.device, p.dtype):
                    state[name] = value.to(p.device, p.dtype)
        device = next(self._params()).device
        for name, value in self.hyper.items():
            if isinstance(value, Tensor) and value.device != device:
                self.hyper[name] = value.to(device, precision(device))

    @outside_autograd
    def add_param_group(self, group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: half-precision or complex weights; a hyper-parameter that belongs to the whole filter.
        """
        first = self.param_groups[0] if self.param_groups else self.defaults
        for name in group.keys() & self.defaults.keys() - set(self.group_keys):
            if group[name] != first[name]:
                raise ValueError(f"{self._name}: {name} belongs to the whole filter, not to a parameter group")
        self._check_values({name: group[name] for name in self.group_keys if name in group})
        super().add_param_group(group)
        try:
            self._check_dtypes(group["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        self._make_state(self.param_groups[-1])

    @outside_autograd
    def state_dict(self) -> dict[str, Any]:
        """As torch's. Covariances are the optimizer's own, as state is in torch (copy them to keep them); scalars of
        the filter are a snapshot."""
        drop_state(self)
        return super().state_dict()

    def _check_loaded(self, groups: list[dict[str, Any]], state: dict[int, dict[str, Any]]) -> None:
        fits = self.hyper.keys() <= groups[0].keys() | {"R", "packs"}
        for ours, group in zip(self.param_groups, groups if fits else (), strict=False):  # torch counts the groups
            held = [i for i, index in enumerate(group["params"]) if index in state]
            given = {(i, name): value.shape for i in held for name, value in state[group["params"][i]].items()}
            wanted = {(i, name): shape for i, name, shape in self._expected(group, ours["params"], held)}
            fits = fits and given == wanted
        if not fits:
            raise ValueError(f"{self._name}: the state is of another optimizer, or of another model")

    @outside_autograd
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but nothing is shared with ``state_dict``.

        Raises:
            ValueError: it is of another optimizer or another model; nothing is changed then.
        """
        self._check_loaded(state_dict["param_groups"], state_dict["state"])
        super().load_state_dict(copy.deepcopy(state_dict))
        self._settle()


def trainable(p: Tensor) -> bool:
    """It requires a gradient, and has a shape."""
    return p.requires_grad and not is_lazy(p)
