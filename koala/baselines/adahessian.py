"""AdaHessian (Yao et al., AAAI 2021, arXiv 2006.00719): pytorch-optimizer's, with the average over convolution
kernels."""

import pytorch_optimizer
from torch import Tensor

from koala.baselines.state import CopiedState


class AdaHessian(CopiedState, pytorch_optimizer.AdaHessian):
    """Adam with the Hessian's diagonal, estimated once a step, in place of the gradient's square::

        d = |v * (H v)| with v = +-1 at random, averaged over the two spatial dimensions of a convolution kernel
        m <- beta1 m + (1 - beta1) g ;  w <- beta2 w + (1 - beta2) d^2
        x <- x - lr ( m / (1 - beta1^t) / ((w / (1 - beta2^t))^(k/2) + eps) + weight_decay x )

    pytorch-optimizer's class lacks the spatial average of the authors' and of KOALA++'s tables. Gradients must be made
    with `create_graph=True`, and without a loss scaler, whose factor would stay in d.

    Args:
        params: parameters.
        lr, betas, eps, weight_decay: as above.
        hessian_power: the exponent k.
        update_period: steps between estimates of d.
    """

    def __init__(
        self,
        params,
        lr: float = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        update_period: int = 1,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            weight_decouple=True,
            hessian_power=hessian_power,
            update_period=update_period,
        )

    def compute_hutchinson_hessian(self, param_groups, state, *args, **kwargs) -> None:
        """The library's estimate, then the average."""
        pytorch_optimizer.AdaHessian.compute_hutchinson_hessian(param_groups, state, *args, **kwargs)
        for group in param_groups:
            for parameter in group["params"]:
                estimate: Tensor | None = state[parameter].get("hessian")
                if estimate is not None and estimate.dim() == 4:
                    estimate.copy_(estimate.abs().mean((2, 3), keepdim=True).expand_as(estimate))
