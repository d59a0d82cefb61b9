"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) with the AdamW that its authors put beside it, at one
rate (Liu et al., 2025, arXiv 2502.16982)."""

import pytorch_optimizer
from torch import nn

from koala.baselines.state import CopiedState


class Muon(CopiedState, pytorch_optimizer.Muon):
    """Momentum orthogonalised by Newton-Schulz for hidden matrices; AdamW for the rest.

    As its authors say: hidden weights of two or more dimensions (a convolution kernel is a matrix of its filters) take
    Muon; embeddings, the output layer (the last Linear, or one tied to an embedding), gains and biases take AdamW.

    Args:
        module: the network, whose parameters are divided so.
        lr: of both halves: a matrix's update is scaled by 0.2 sqrt(max(rows, columns)), which makes its entries as
            large as AdamW's, so that AdamW's rates serve (2502.16982, section 2.2). The first authors' two rates, 0.02
            and 3e-4, are two things to tune: with one tuned and the other left, a vocabulary hardly moves.
        momentum, nesterov, ns_steps: Muon's.
        weight_decay: decoupled, of both halves.
        betas, eps: the other half's.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ):
        hidden = {id(parameter) for parameter in hidden_matrices(module)}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        halves = [
            {"params": [p for p in trained if id(p) in hidden], "use_muon": True},
            {"params": [p for p in trained if id(p) not in hidden], "use_muon": False},
        ]
        super().__init__(
            [half | {"weight_decay": weight_decay} for half in halves if half["params"]],
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            use_adjusted_lr=True,
            adamw_lr=lr,
            adamw_betas=betas,
            adamw_eps=eps,
        )


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trainable tensors of two or more dimensions, less embeddings and the output layer."""
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    output = [id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)][-1:]
    # A parameter that the network itself holds, such as a table of positions, is an embedding too.
    tables = {id(parameter) for parameter in module.parameters(recurse=False)}
    excluded = embeddings | tables | set(output)
    return [p for p in module.parameters() if p.requires_grad and p.dim() >= 2 and id(p) not in excluded]
