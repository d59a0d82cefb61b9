"""AdaFisher and AdaFisherW (Martins Gomes et al., ICLR 2025, arXiv 2405.16397), from their equations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koala.baselines.closure import evaluated
from koala.baselines.ranks import average
from koala.baselines.state import CopiedState

LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)  # exactly these classes have statistics


class AdaFisher(CopiedState):
    r"""Steps along the averaged gradient over a diagonal Fisher matrix F, layer by layer the product of two vectors.

    Every `update_period`-th step takes of each layer's inputs h and of the gradients s with respect to its outputs

        ========== =========================================================== ==============================
        layer      H (input side)                                              S (output side)
        ========== =========================================================== ==============================
        Linear     mean over rows of (h, 1)^2                                  mean over rows of s^2
        Conv2d     mean over positions of the patch (and a 1)^2, / its length  mean over positions of s^2
        BatchNorm  (sum_c (sum h_c / T^2)^2 / N^2, C / N^2)                    per channel (sum s_c)^2 / N
        LayerNorm  the same, its input's dimension 1 as c                      per feature (sum s)^2 / N
        ========== =========================================================== ==============================

    with N samples, T positions, the 1 where the layer has a bias, and all groups of a convolution pooled. Then::

        norm(v) = (v - min v) / (max v - min v + 1e-6)             (+inf is first set to 1, -inf to 0)
        H <- 0.1 gamma H + 0.01 gamma norm(H_new),  S likewise     (both start at ones)
        F = S H^T + damping                                        (the last column is the bias's)
        g <- g + weight_decay x ;  m <- beta m + (1 - beta) g ;  x <- x - lr m / ((1 - beta^t) F)

    :class:`AdaFisherW` decouples the decay: x <- x - lr (m / ((1 - beta^t) F) + weight_decay x). A tensor of no such
    layer has F = 1, so its rate is about `damping` of the others'.

    What the equations imply (each is a test): the averaging is not convex, so H and S end in [0, 0.0087] and F is at
    most damping + 7.6e-5, that is, momentum SGD at the rate lr / damping after a slower start; and 1e-6 is absolute, so
    F depends on the loss's scale.

    Departures from the released code: tensors are matched to layers by module, not by walking both by position and
    shape, which leaves tensors of Swin and of GPT-1 without updates there; statistics are averaged over ranks at
    refreshes only, where they change.

    Args:
        module: the network; it is watched through hooks, so it must be called as a module and not be compiled or
            sharded.
        lr: learning rate (eta).
        beta: memory of the averaged gradient.
        damping: Lambda.
        gamma: of the averages of H and S.
        update_period: steps between refreshes (TCov); the first step is one.
        weight_decay: lambda.
        loss_scale: factor on s. The released image runs kept the loss scaler's 65536 in it, on CUDA.

    Raises:
        ValueError: a value out of range; a convolution padded by name.
    """

    decoupled = False

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1e-3,
        *,
        beta: float = 0.9,
        damping: float = 1e-3,
        gamma: float = 0.8,
        update_period: int = 100,
        weight_decay: float = 0.0,
        loss_scale: float = 1.0,
    ):
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("beta", beta, 0 <= beta < 1),
            ("damping", damping, damping > 0),
            ("gamma", gamma, gamma > 0),
            ("update_period", update_period, update_period >= 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("loss_scale", loss_scale, loss_scale > 0),
        ):
            if not good:
                raise ValueError(f"{name}={value} is out of range")
        defaults = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "gamma": gamma,
            "weight_decay": weight_decay,
            "steps": 0,
        }
        super().__init__([p for p in module.parameters() if p.requires_grad], defaults)
        self.update_period, self.loss_scale = update_period, loss_scale
        self._layers = [_Layer(layer) for layer in module.modules() if _has_statistics(layer)]
        self._layer_of = {parameter: (layer, name) for layer in self._layers for name, parameter in layer.parameters()}
        for layer in self._layers:
            _watch(layer, self._is_refreshing)

    def _is_refreshing(self) -> bool:
        return self.param_groups[0]["steps"] % self.update_period == 0

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; the backward pass of a refreshing step must have been run since the step before it."""
        if closure is not None:
            for layer in self._layers:
                layer.forget()  # earlier passes belong to no step
        loss = evaluated(closure)
        if self._is_refreshing():
            self._refresh()
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _refresh(self) -> None:
        """Takes the statistics that the hooks gathered into H and S, over all ranks."""
        used = [layer for layer in self._layers if layer.has_sums]
        gamma = self.param_groups[0]["gamma"]
        for layer in used:
            state = self.state[layer.owner]
            for name, new in (("H", layer.inputs()), ("S", layer.outputs(self.loss_scale))):
                old = state.get(name, torch.ones_like(new))
                state[name] = 0.1 * gamma * old + 0.01 * gamma * normalised(new)
        average([self.state[layer.owner][name] for layer in used for name in ("H", "S")])
        for layer in used:
            layer.forget()

    def fisher(self, parameter: nn.Parameter) -> Tensor | None:
        """F of a tensor without the damping, in its shape; None if its layer has no statistics."""
        layer, name = self._layer_of.get(parameter, (None, ""))
        if layer is None or "H" not in self.state[layer.owner]:  # no such layer, or one never called as a module
            return None
        h, s = self.state[layer.owner]["H"], self.state[layer.owner]["S"]
        columns = h[-1:] if name == "bias" else h[: parameter[0].numel()]
        return torch.outer(s, columns).view_as(parameter)

    def _move(self, parameter: nn.Parameter, group: dict) -> None:
        """The update of one tensor."""
        state, grad, fisher = self.state[parameter], parameter.grad, self.fisher(parameter)
        if "momentum" not in state:
            state["step"], state["momentum"] = torch.tensor(0.0, device="cpu"), torch.zeros_like(parameter)
        state["step"] += 1
        if group["weight_decay"] and not self.decoupled:
            grad = grad.add(parameter, alpha=group["weight_decay"])
        momentum = state["momentum"].lerp_(grad, 1 - group["beta"])
        rate = group["lr"] / (1 - group["beta"] ** state["step"].item())
        if group["weight_decay"] and self.decoupled:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if fisher is None:
            parameter.add_(momentum, alpha=-rate)
        else:
            parameter.addcdiv_(momentum, fisher.add_(group["damping"]), value=-rate)


class AdaFisherW(AdaFisher):
    """:class:`AdaFisher` with decoupled weight decay."""

    decoupled = True


def normalised(vector: Tensor) -> Tensor:
    """`vector` moved and scaled to about [0, 1]; the 1e-6 is absolute, as published."""
    vector = torch.nan_to_num(vector, nan=float("nan"), posinf=1.0, neginf=0.0)
    low, high = vector.aminmax()
    return (vector - low) / (high - low + 1e-6)


def _has_statistics(layer: nn.Module) -> bool:
    """Whether F of the layer's tensors is estimated."""
    if type(layer) not in LAYERS or not any(p.requires_grad for p in layer.parameters()):
        return False
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) > 1:
        return False
    if type(layer) is nn.Conv2d and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        raise ValueError(f"AdaFisher takes convolutions padded with a number of zeros, not {layer}")
    return True


@dataclass
class _Layer:
    """One layer, and sums over its inputs and output gradients since the last refresh, over all pieces of a batch."""

    module: nn.Module
    sums: dict[str, Tensor | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bias = self.module.bias
        self.is_norm = isinstance(self.module, (nn.BatchNorm2d, nn.LayerNorm))
        self.owner = next(parameter for _, parameter in self.parameters())

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its trained parameters by name."""
        return ((name, p) for name, p in self.module.named_parameters(recurse=False) if p.requires_grad)

    @property
    def has_sums(self) -> bool:
        """Whether a backward pass went through the layer since `forget`."""
        return "s" in self.sums

    def forget(self) -> None:
        """Starts the sums anew."""
        self.sums.clear()

    def _add(self, name: str, value) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_input(self, h: Tensor) -> None:
        """Adds the sums over an input of the layer."""
        h = h.detach().to(self.owner.dtype)
        if self.is_norm:
            others = [dim for dim in range(h.dim()) if dim != 1]
            self._add("h", h.sum(others))
            self._add("samples", len(h))
            self.sums["positions"] = h[0, 0].numel()
        elif isinstance(self.module, nn.Linear):
            rows = h.flatten(0, -2)
            self._add("h", rows.square().sum(0))
            self._add("rows", len(rows))
        else:
            # The sum over samples of a patch's squares is the patch of the summed squares, a batch of one to unfold.
            conv, squares = self.module, h.square().sum(0, keepdim=True)
            patches = F.unfold(squares, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            self._add("h", patches.sum((0, 2)).view(conv.groups, -1).sum(0))
            self._add("rows", len(h) * patches.shape[2] * conv.groups)

    def add_gradient(self, s: Tensor) -> None:
        """Adds the sums over a gradient with respect to the layer's output."""
        s = s.detach().to(self.owner.dtype)
        rows = (
            s.flatten(0, -2)
            if isinstance(self.module, (nn.Linear, nn.LayerNorm))
            else s.transpose(1, -1).flatten(0, -2)
        )
        self._add("s", rows.sum(0) if self.is_norm else rows.square().sum(0))
        self._add("outputs", len(rows))

    def inputs(self) -> Tensor:
        """H of the summed inputs."""
        h = self.sums["h"]
        if self.is_norm:
            samples, positions = self.sums["samples"], self.sums["positions"]
            data = (h / positions**2).square().sum() / samples**2
            return torch.stack([data, data.new_tensor(h.numel() / samples**2)])
        h = h / self.sums["rows"]
        if self.bias is not None:
            h = torch.cat([h, h.new_ones(1)])
        return h / h.numel() if isinstance(self.module, nn.Conv2d) else h

    def outputs(self, scale: float) -> Tensor:
        """S of the summed gradients, of a loss `scale` times as large."""
        if self.is_norm:
            return (scale * self.sums["s"]).square() / self.sums["samples"]
        return scale**2 * self.sums["s"] / self.sums["outputs"]


def _watch(layer: _Layer, wanted: Callable[[], bool]) -> None:
    """Hooks the layer: while `wanted`, and not in evaluation, its inputs and output gradients are added to its sums.

    Plain functions, which a copy of the network (weight averages) shares; a method would be copied with its optimizer.
    The gradient comes through a hook of the tensor, since a module's hook fails for an output that is changed in
    place.
    """

    def add(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled() and module.training and output.requires_grad and wanted():
            layer.add_input(inputs[0])
            output.register_hook(layer.add_gradient)

    layer.module.register_forward_hook(add)
