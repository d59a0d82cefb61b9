"""Shampoo (Gupta et al., ICML 2018, arXiv 1802.09568) as KOALA++'s tables ran it."""

import torch
from pytorch_optimizer.optimizer.utils.matrix import compute_power_schur_newton
from torch import Tensor

from koala.baselines.preconditioned import PreconditionedSGD


class Shampoo(PreconditionedSGD):
    """Multiplies the gradient G of every tensor of k >= 2 dimensions along each mode i by a root of its moments::

        L_i <- L_i + G_(i) G_(i)^T ,  starting at damping I
        G   <- (L_i + damping lambda_max(L_i) I)^(-1/(2k)) along mode i

    so exponent 1/4 for a matrix and 1/8 for a convolution kernel; then clips and steps as
    :class:`~koala.baselines.preconditioned.PreconditionedSGD`. No blocking, no grafting, no averaging; a mode of size 1
    is left alone, tensors of one dimension keep their gradient. Roots by pytorch-optimizer's coupled Newton iteration,
    at most 100 rounds, to 1e-6.

    pytorch-optimizer's own Shampoo has the same exponents, but another update around them: it mixes the raw gradient
    with the last preconditioned one before preconditioning, adds decay there too, scales vectors by (g g^T)^(-1/2),
    takes roots by SVD without a ridge that follows lambda_max, and does not clip.

    Memory: n_i^2 numbers for each mode, so a token embedding of V rows takes V^2.

    Args:
        params: parameters or groups.
        lr, momentum, weight_decay, clip, damping: see the base class; the defaults are the released CNN setting.
    """

    def __init__(
        self,
        params,
        lr: float = 0.3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        damping: float = 1e-12,
    ):
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay, clip=clip, damping=damping)

    def precondition(self) -> None:
        """Preconditions every gradient of two or more dimensions."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() >= 2:
                    parameter.grad.copy_(self._preconditioned(parameter.grad, self.state[parameter]))

    def _preconditioned(self, grad: Tensor, state: dict) -> Tensor:
        """Adds `grad` to the moments of its modes in `state`, and multiplies it by their roots."""
        order, result = grad.dim(), grad
        for mode, size in enumerate(grad.shape):
            if size == 1:
                continue
            name, unfolded = f"moments_{mode}", grad.movedim(mode, 0).flatten(1)
            if name not in state:
                state[name] = self.damping * torch.eye(size, dtype=grad.dtype, device=grad.device)
            state[name].addmm_(unfolded, unfolded.T)
            root = compute_power_schur_newton(
                state[name], 2 * order, max_iters=100, error_tolerance=1e-6, ridge_epsilon=self.damping
            )
            result = torch.tensordot(root, result, dims=([1], [mode])).movedim(0, mode)
        return result
