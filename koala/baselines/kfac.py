"""K-FAC (Martens and Grosse, ICML 2015; convolutions: Grosse and Martens, ICML 2016) as KOALA++'s tables ran it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from koala.baselines.preconditioned import PreconditionedSGD
from koala.baselines.ranks import average

try:
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
except ImportError as error:
    raise ImportError(f"K-FAC is built on curvlinops; pip install '.[suite]' ({error})") from error


class KFAC(PreconditionedSGD):
    """Natural gradient of an image classifier with a Kronecker-factored Fisher matrix, one pair of factors a layer.

    Every `update_period`-th step, afresh from that step's batch (nothing is averaged over steps), for each Linear and
    Conv2d::

        A = mean over samples and positions of a a^T           a: the layer's input (no bias entry)
        B = (1/N) sum over samples and positions of g g^T      g: of one sample's loss, its label drawn
        pi = sqrt((tr A / dim A) / (tr B / dim B)) ,  r = sqrt(damping)

    and at every step::

        G_W <- (B + (r / pi) I)^-1 G_W (A + r pi I)^-1 ,  g_b <- (B + (r / pi) I)^-1 g_b     (dampings at least 1e-7)

    then clips and steps as :class:`~koala.baselines.preconditioned.PreconditionedSGD`. Other tensors keep their
    gradient, as does a layer until a refreshing step has used it. The factors come from curvlinops' operators, which
    pool the groups of a grouped convolution. BatchNorm's running statistics do not notice the pass that makes them.
    Over ranks the factors are those of the whole batch.

    Departure from the released code: there a last batch smaller than the others counts less on refreshing steps.

    Args:
        module: the classifier, images [B, C, H, W] to logits [B, classes]; called as a module, whole on every rank.
        lr, momentum, weight_decay, clip, damping: see the base class; the defaults are the released CNN setting.
        update_period: steps between refreshes; the first step is one.
        seed: of the drawn labels, with the number of the step and the rank.

    Raises:
        ValueError: a value out of range.
        ImportError: (on import of this module) curvlinops is missing.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        damping: float = 1e-3,
        update_period: int = 10,
        seed: int = 0,
    ):
        if update_period < 1:
            raise ValueError(f"update_period={update_period}: must be 1 or more")
        parameters = [p for p in module.parameters() if p.requires_grad]
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay, clip=clip, damping=damping)
        self.param_groups[0]["steps"] = 0
        self.update_period, self.seed, self.module = update_period, seed, module
        # Each layer's weight, and its bias (or None)
        self.layers: list[tuple[nn.Parameter, nn.Parameter | None]] = [
            (layer.weight, layer.bias if layer.bias is not None and layer.bias.requires_grad else None)
            for layer in module.modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.requires_grad
        ]
        self.inputs: list[Tensor] = []

        def keep(_, inputs: tuple) -> None:
            """Keeps the images of a refreshing step, from which the factors are computed again."""
            if torch.is_grad_enabled() and module.training and self._is_refreshing():
                self.inputs.append(inputs[0].detach())

        module.register_forward_pre_hook(keep)

    def _is_refreshing(self) -> bool:
        return self.param_groups[0]["steps"] % self.update_period == 0

    def step(self, closure=None):
        """See the base class; the backward pass of a refreshing step must have been run since the step before it."""
        if closure is not None:
            self.inputs.clear()  # earlier forward passes belong to no step
        return super().step(closure)

    def precondition(self) -> None:
        """Replaces the gradient of each layer with factors by its natural gradient."""
        if self._is_refreshing():
            self._refresh()
        self.inputs = []
        self.param_groups[0]["steps"] += 1
        for weight, bias in self.layers:
            state = self.state[weight]
            if "A_inverse" not in state or weight.grad is None:
                continue
            natural = state["B_inverse"] @ weight.grad.flatten(1) @ state["A_inverse"]
            weight.grad.copy_(natural.view_as(weight))
            if bias is not None and bias.grad is not None:
                bias.grad.copy_(state["B_inverse"] @ bias.grad)

    def _refresh(self) -> None:
        """The damped inverses of both factors of every layer that this step used, at the present weights."""
        inputs, self.inputs = self.inputs, []
        rank = dist.get_rank() if dist.is_initialized() else 0
        weights = [weight for weight, _ in self.layers if weight.grad is not None]
        if not weights:
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        operator = KFACLinearOperator(
            self.module,
            nn.CrossEntropyLoss(),
            weights,
            [(x, torch.zeros(len(x), dtype=torch.long, device=x.device)) for x in inputs],  # labels are drawn
            fisher_type="mc",
            mc_samples=1,
            kfac_approx="expand",
            separate_weight_and_bias=True,
            num_per_example_loss_terms=1,
            check_deterministic=False,
            seed=(self.seed * 1_000_003 + self.param_groups[0]["steps"]) * 4096 + rank,
        )
        with torch.enable_grad():
            operator.compute_kronecker_factors()
        for buffer, value in buffers:
            buffer.copy_(value)
        factors = operator.state_dict()
        pairs = [factors["input_covariances"], factors["gradient_covariances"]]
        average([factor for pair in pairs for _, factor in sorted(pair.items())], weight=sum(map(len, inputs)))
        inverse = KFACInverseLinearOperator(
            operator, damping=self.damping, use_heuristic_damping=True, min_damping=1e-7
        )
        _ = inverse @ [torch.zeros_like(weight) for weight in weights]  # makes and keeps the inverses
        inverses = inverse.state_dict()
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for weight in weights:
            layer = names[weight].rpartition(".")[0]
            if layer in inverses["inverse_input_covariances"]:
                self.state[weight]["A_inverse"] = inverses["inverse_input_covariances"][layer]
                self.state[weight]["B_inverse"] = inverses["inverse_gradient_covariances"][layer]
