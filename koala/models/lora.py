"""A classifier fine-tuned by low-rank factors (LoRA, Hu et al., ICLR 2022): pretrained by others or by train.py."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from koala.errors import ConfigError, first_line
from koala.schema import Schema, Word, check


class LoRASpec(Schema):
    """``base``: keys of the model that is adapted, also its ``pretrained`` weights. ``pretrained``:
    the folder ``checkpoints`` of a run of it, whose last one is taken; null: the base is as it is built. ``rank`` and
    ``alpha``: of the factors, scaled by alpha / rank. ``targets``: names of layers, or their last parts, that get
    factors. ``head``: the last part of the network, its classifier, is trained whole.

    A head for other classes is drawn, as in any fine-tuning; a first layer of colour images takes grey ones by the sum
    of its channels. Everything else is frozen, BatchNorm with its statistics too, so that samples do not mix.
    """

    name: Word
    kind: Literal["vision", "text-classification"]
    family: Literal["lora"]
    base: dict[str, Any]
    pretrained: str | None = None
    rank: Annotated[int, Field(ge=1)] = 4
    alpha: Annotated[float, Field(gt=0)] = 8.0
    targets: Annotated[list[str], Field(min_length=1)]
    head: bool = True

    @model_validator(mode="after")
    def _is_of_the_kind_of_its_base(self) -> "LoRASpec":
        if self.base.get("kind") != self.kind:
            raise ConfigError("base.kind", self.base.get("kind"), f"the adapted model is of kind {self.kind}")
        return self

    def build(self, **shapes: int) -> nn.Module:
        """Builds the base, of ``shapes`` as its own ``build`` takes them, loads its weights and adapts it."""
        from koala.models import schema_of  # which names this module

        try:
            model = check(schema_of(self.base), self.base, "model.").build(**shapes)
        except ConfigError as error:
            key = error.key.replace("model.", "model.base.", 1)
            raise ConfigError(key, error.value, error.reason, valid=error.valid) from error
        if self.pretrained:
            _load(model, Path(self.pretrained))
        return Adapted(model, self)


class Adapted(nn.Module):
    """``network`` with trainable factors beside its frozen weights; its BatchNorm stays in evaluation mode."""

    def __init__(self, network: nn.Module, spec: LoRASpec):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError("model", spec.name, "needs peft; bash scripts/setup.sh installs it") from error
        head = _head(network)
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
        try:
            self.network = inject_adapter_in_model(config, network)
        except ValueError as error:  # peft's, of layers that are not there
            layers = {name.rpartition(".")[2] for name, part in network.named_modules()
                      if isinstance(part, (nn.Linear, nn.Conv2d))}  # fmt: skip
            raise ConfigError("model.targets", spec.targets, first_line(error), valid=layers) from error
        if spec.head:
            network.get_submodule(head).requires_grad_(True)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the network takes, to logits."""
        return self.network(inputs)

    def train(self, mode: bool = True) -> nn.Module:
        """As torch's, but for BatchNorm."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
        return self


def _head(network: nn.Module) -> str:
    """The name of the last part with weights."""
    return [name for name, part in network.named_children() if any(True for _ in part.parameters())][-1]


def _load(network: nn.Module, folder: Path) -> None:
    """Weights of the last checkpoint in a run's folder of them, where they fit; what cannot fit is drawn.

    Raises:
        ConfigError: there is none, or it is of another network.
    """
    files = sorted((path for path in folder.glob("step-*") if path.is_file()), key=lambda path: path.stem)
    if not files:
        raise ConfigError("model.pretrained", folder, "holds no checkpoint", valid="the folder checkpoints of a run")
    try:
        state = torch.load(files[-1], map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # torch and pickle raise many kinds
        raise ConfigError("model.pretrained", folder, f"{files[-1].name} cannot be read ({error})") from error
    here, head = network.state_dict(), _head(network)
    if here.keys() != state.keys():
        raise ConfigError("model.pretrained", folder, "is of another network than model.base")
    for name, value in state.items():
        if value.dim() == 4 and value.shape[1] == 3 and here[name].shape[1] == 1:
            value = value.sum(1, keepdim=True)
        if value.shape == here[name].shape:
            here[name].copy_(value)
        elif not name.startswith(f"{head}."):
            reason = f"{name} is {tuple(value.shape)}, in model.base {tuple(here[name].shape)}"
            raise ConfigError("model.pretrained", folder, reason)
