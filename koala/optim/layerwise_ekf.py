"""The extended Kalman filter with a covariance of blocks and a forgetting factor: LKF, RLEKF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .loss import precision
from .measurement import Measurement
from .output_filter import OutputFilter, trainable
from .registry import register


@dataclass(frozen=True)
class Block:
    """Weights that share a covariance: ``parts`` are (parameter, start, stop) of flat parameters; the first one's state
    holds the covariance under ``key``."""

    parts: tuple[tuple[Tensor, int, int], ...]
    key: str

    @property
    def lengths(self) -> list[int]:
        """Weights of each part."""
        return [stop - start for _, start, stop in self.parts]

    @property
    def size(self) -> int:
        """Weights in all: the covariance is [size, size]."""
        return sum(self.lengths)


def pack(params: list[Tensor], block_size: int) -> list[Block]:
    """Blocks in the order of the parameters, as RLEKF packs them: small tensors share one while they fit; a tensor of
    ``block_size`` or more is cut into blocks of its own."""
    packed: list[list[tuple[Tensor, int, int]]] = []
    room = 0
    for p in params:
        size = p.numel()
        if size >= block_size:
            packed += [[(p, start, min(start + block_size, size))] for start in range(0, size, block_size)]
            room = 0
        elif size > room:
            packed.append([(p, 0, size)])
            room = block_size - size
        elif size:
            packed[-1].append((p, 0, size))
            room -= size
    return [Block(tuple(parts), f"P.{parts[0][1] // block_size}") for parts in packed]


def blocks_of(params: list[Tensor], group: dict[str, Any]) -> list[Block]:
    """The blocks of a group whose ``packs`` say which parameters (their indices) are packed together."""
    return [block for members in group["packs"] for block in pack([params[i] for i in members], group["block_size"])]


@register(
    "lkf",
    "extended Kalman filter that measures the outputs, with blocks of covariance and a forgetting factor",
    "Hu et al., RLEKF, AAAI 2023, arXiv 2212.06989",
)
class LayerwiseEKF(OutputFilter):
    r"""Extended Kalman filter with one dense covariance for each block of weights, and a forgetting factor.

    The weights are cut into L blocks of at most ``block_size``, about a layer each. One innovation covariance S spans
    them all. With :math:`H_i` the columns of the Jacobian that belong to block i, and R as in
    :class:`koala.DiagonalEKF`,

    .. math::
        P_i &\leftarrow P_i / \lambda \\
        S &= \textstyle\sum_i H_i P_i H_i^\top + L R \\
        w_i &\leftarrow w_i + P_i H_i^\top S^{-1} (y - h(w)), \qquad
        P_i \leftarrow P_i - P_i H_i^\top S^{-1} H_i P_i \\
        \lambda &\leftarrow \nu \lambda + 1 - \nu

    With one output, one sample and r = 1 this is RLEKF, the LKF of DeePMD-kit, whose :math:`1 / A` is :math:`\lambda
    S`. On a linear network in one block it is recursive least squares with a forgetting factor. There is no learning
    rate. A block with frozen and trained weights goes on as a whole: the variance of what is frozen there falls, too.

    Args:
        params: float32 or float64 parameters, or groups of them. No block spans two groups.
        block_size: weights per block, and floats per weight of the covariance. RLEKF has 5120, for networks of some
            ten thousand weights.
        p0: the covariance is p0 I at the beginning.
        lam: :math:`\lambda` at the beginning. The variance of directions that no sample measures grows by
            :math:`1 / \lambda` at each step, in all by :math:`\exp((1 - \lambda) / (1 - \nu))`.
        nu: how fast :math:`\lambda` approaches 1.
        batch_rule: "exact": a batch is B C measurements. "deepmd" (gaussian, r a number): the one that DeePMD-kit makes
            of it, which agrees for B = C = 1 only: the sum over samples of the outputs times the signs of their errors,
            its error :math:`\sqrt{B}` times the mean absolute error (means over the C outputs of a sample).
        r, beta, likelihood, robust, noise, residual, r0, jitter, chunk_size: as of :class:`koala.DiagonalEKF`.

    Raises:
        ValueError: a hyper-parameter out of range or an unknown choice.

    References: Hu et al., *RLEKF: An Optimizer for Deep Potential with Ab Initio Accuracy*, AAAI 2023,
    arXiv:2212.06989. The batch rule: *Training one DeePMD Model in Minutes*, PPoPP 2024, with energies' and forces'
    prefactors of 1.
    """

    def __init__(
        self,
        params,
        block_size: int = 256,
        *,
        p0: float = 1.0,
        lam: float = 0.98,
        nu: float = 0.9987,
        r: float | None = 1.0,
        beta: float | None = None,
        likelihood: str = "gaussian",
        batch_rule: str = "exact",
        robust: float | None = None,
        noise: str = "isotropic",
        residual: str = "posterior",
        r0: float = 1.0,
        jitter: float = 1e-3,
        chunk_size: int = 64,
    ) -> None:
        defaults = {
            "block_size": block_size, "p0": p0, "lam": lam, "nu": nu, "r": r, "beta": beta, "likelihood": likelihood,
            "batch_rule": batch_rule, "robust": robust, "noise": noise, "residual": residual, "r0": r0,
            "jitter": jitter, "chunk_size": chunk_size,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.hyper["forgetting"] = torch.full_like(self.hyper["nis"], lam)

    def _check_values(self, values: dict[str, Any]) -> None:
        super()._check_values(values)
        for name in ("lam", "nu"):
            if name in values and not 0 < values[name] <= 1:
                raise ValueError(f"{self._name}: {name} must be above 0 and at most 1, got {values[name]}")
        if values.get("p0") == 0:
            raise ValueError(f"{self._name}: p0 must be above 0, got 0")
        if values.get("batch_rule") == "deepmd":
            for name, valid in (("likelihood", "gaussian"), ("robust", None)):
                if values[name] != valid:
                    raise ValueError(f"{self._name}: batch_rule=deepmd has {name}={valid} only, got {values[name]}")
            if values["r"] is None:
                raise ValueError(f"{self._name}: batch_rule=deepmd needs a number r, got None")

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all groups in which a weight is trained, in order."""
        blocks = (block for group in self.param_groups for block in blocks_of(group["params"], group))
        return [block for block in blocks if any(p.requires_grad for p, _, _ in block.parts)]

    def _make_state(self, group: dict[str, Any]) -> None:
        """What is trained and in no pack is packed together: parameters that are thawed later do not repack others."""
        params = group["params"]
        if "packs" not in group:
            group["packs"] = [[i for i, p in enumerate(params) if p in self.state]]
        packed = set(chain.from_iterable(group["packs"]))
        if new := [i for i, p in enumerate(params) if trainable(p) and i not in packed]:
            group["packs"] = [pack for pack in [*group["packs"], new] if pack]
        for block in blocks_of(params, group):
            members = [p for p, _, _ in block.parts]
            held = self.state.get(members[0], {}).get(block.key)
            if held is None or len(held) != block.size or any(p not in self.state for p in members):
                P = torch.eye(block.size, dtype=members[0].dtype, device=members[0].device)
                self.state[members[0]][block.key] = P.mul_(group["p0"])
            for p in members:
                self.state[p]  # has an entry from now on

    def _expected(self, group: dict[str, Any], params: list[Tensor], held: list[int]) -> Iterator[tuple[int, str, Any]]:
        packs = [[i for i in pack if i < len(params)] for pack in group.get("packs", [held])]
        index = {id(p): i for i, p in enumerate(params)}
        for block in blocks_of(params, {**group, "packs": packs}):
            yield index[id(block.parts[0][0])], block.key, torch.Size((block.size, block.size))

    def _predict(self) -> None:
        for block in self.blocks:
            P = self.state[block.parts[0][0]][block.key]
            P.div_(self.hyper["forgetting"].to(P))

    def _measure(self, outputs: Tensor, targets: Tensor) -> Measurement:
        seen = super()._measure(outputs, targets)
        seen.noise = seen.noise * len(self.blocks)
        if self.hyper["batch_rule"] == "exact":
            return seen
        count, size = seen.error.shape
        with torch.enable_grad():
            signed = (seen.error.sign().to(outputs) * outputs).sum().view(1, 1) / size
        error = seen.error.abs().mean().view(1, 1) * count**0.5
        return Measurement(signed, error, seen.noise[:1, :1, :1])

    def _spread(self, rows: list[Tensor | None]) -> Tensor:
        """The rows become, block by block, H_i and P_i H_i^T: [M, size] and [size, M]."""
        columns = dict(zip(self._trained(), rows, strict=True))
        rows.clear()
        total = 0
        for block in self.blocks:
            H = _columns(block, columns)
            if H is not None:
                X = self.state[block.parts[0][0]][block.key] @ H.mT
                total = total + (H @ X).to(precision(H.device))
                rows.append(X)
            else:
                rows.append(None)
        return (total + total.mT) / 2

    def _correct(self, rows: list[Tensor | None], factor: Tensor, white: Tensor, noise: Tensor) -> None:
        steps: dict[Tensor, list[Tensor]] = {}
        for block, X in zip(self.blocks, rows, strict=True):
            if X is None:
                continue
            V = torch.linalg.solve_triangular(factor.to(X), X.mT, upper=False)
            P = self.state[block.parts[0][0]][block.key]
            P.addmm_(V.mT, V, alpha=-1)
            P.copy_((P + P.mT) / 2)
            moved = (V.mT @ white.to(X)).view(-1).split(block.lengths)
            for (p, _, _), part in zip(block.parts, moved, strict=True):
                steps.setdefault(p, []).append(part)
        for p, parts in steps.items():  # the parts of a parameter come in order
            if p.requires_grad:
                p.add_(torch.cat(parts).view_as(p))
        forgetting, nu = self.hyper["forgetting"], self.hyper["nu"]
        self.hyper["forgetting"] = nu * forgetting + 1 - nu

    def diagnostics(self) -> dict[str, Tensor]:
        """As of every such filter; and ``forgetting``, which is lambda."""
        return {**super().diagnostics(), "forgetting": self.hyper["forgetting"]}

    def _mean_variance(self) -> Tensor:
        traces = [self.state[block.parts[0][0]][block.key].trace() for block in self.blocks]
        count = self.hyper["nis"].new_tensor(sum(block.size for block in self.blocks))
        return sum(trace.to(count) for trace in traces) / count


def _columns(block: Block, rows: dict[Tensor, Tensor | None]) -> Tensor | None:
    """H of a block, [M, size]; None where no output depends on it."""
    given = [rows.get(p) for p, _, _ in block.parts]
    if all(H is None for H in given):
        return None
    count = next(len(H) for H in given if H is not None)
    parts = [p.new_zeros(count, stop - start) if H is None else H[:, start:stop]
             for (p, start, stop), H in zip(block.parts, given, strict=True)]  # fmt: skip
    return torch.cat(parts, dim=1)
