"""Hard swish and hard sigmoid with second derivatives, which torch's own lack and AdaHessian needs."""

from torch import Tensor, nn


class Hard(nn.Module):
    """Hard sigmoid min(max(x + 3, 0), 6) / 6, or hard swish, x times it."""

    def __init__(self, swish: bool):
        super().__init__()
        self.swish = swish

    def forward(self, x: Tensor) -> Tensor:
        """Acts on every element."""
        gate = nn.functional.relu6(x + 3) / 6
        return x * gate if self.swish else gate


def differentiable_twice(model: nn.Module) -> nn.Module:
    """``model`` with ``Hard`` in place of torch's modules."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, (nn.Hardswish, nn.Hardsigmoid)):
                setattr(parent, name, Hard(swish=isinstance(module, nn.Hardswish)))
    return model
