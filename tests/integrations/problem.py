"""What the loops of docs/training_loops.md are tested with: their code, a small problem, the plain loop as truth."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import koala

PAGE = Path(__file__).parents[2] / "docs" / "training_loops.md"
# At rates at which the first steps of a fresh network are tame.
OPTIMIZERS = {
    "koala-v": {"lr": 0.5},
    "koala-m": {"lr": 0.5, "weight_decay": 0.01},
    "koala++": {"lr": 0.5},
    "sofim": {"lr": 0.1},
    "sgdf": {"lr": 0.1},
}
STEPS, BATCH = 5, 16
ACCUMULATED = [*((name, 4) for name in OPTIMIZERS), ("koala-m", 1)]  # optimizer, pieces of a batch


def snippets(*names: str, **given) -> dict:
    """The namespace after running the named blocks of the page, beginning with its ``setup``."""
    blocks = dict(re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))
    namespace = dict(given)
    for name in ("setup", *names):
        exec(compile(blocks[name], f"{PAGE.name}[{name}]", "exec"), namespace)
    return namespace


class Images(Dataset):
    """Grey pictures of 16x16 with a bright quarter, which is their class; those of ``spoiled`` batches are infinite."""

    def __init__(self, batches: int = STEPS, spoiled: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.randint(4, (batches * BATCH,), generator=generator)
        self.inputs = torch.randn(len(self.targets), 1, 16, 16, generator=generator)
        for image, target in zip(self.inputs, self.targets.tolist(), strict=True):
            image[0, target // 2 * 8 :, target % 2 * 8 :] += 1
        for batch in spoiled:
            self.inputs[batch * BATCH] = torch.inf

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]

    def loader(self, accumulate: int = 1) -> DataLoader:
        """Batches in order, cut in ``accumulate`` pieces."""
        return DataLoader(self, batch_size=BATCH // accumulate)


def optimizer_for(model: nn.Module, name: str) -> koala.KalmanOptimizer:
    return koala.create_optimizer(name, [p for p in model.parameters() if p.requires_grad], **OPTIMIZERS[name])


def trained_plainly(
    model: nn.Module, name: str, *, epochs=1, batches=range(STEPS), clip: float | None = 1.0, autocast=None
) -> nn.Module:
    """A copy of the model trained by the published two calls on whole batches: the truth that trainers are held to."""
    model = copy.deepcopy(model)
    optimizer = optimizer_for(model, name)
    for index, (inputs, targets) in enumerate(list(Images().loader()) * epochs):
        if index % STEPS not in batches:
            continue
        optimizer.predict()
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            outputs = model(inputs)
            losses = F.cross_entropy(getattr(outputs, "logits", outputs), targets, reduction="none")
        losses.mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.update(losses.detach().mean(), losses.detach().square().mean())
    return model


def assert_agree(model: nn.Module, truth: nn.Module, tolerance: float = 1e-4) -> None:
    """Weights are within ``tolerance`` of the truth's."""
    for (name, left), right in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_bits(left: dict, right: dict) -> None:
    """Two state_dicts, of models or optimizers, hold the same bits."""
    left, right = flat(left), flat(right)
    same = {key for key in left.keys() & right.keys() if torch.equal(left[key], right[key])}
    different = sorted((left.keys() | right.keys()) - same)
    assert not different, different


def fp16_scaler(accelerator, monkeypatch) -> torch.amp.GradScaler:
    """Give accelerate, which has fp16 on GPUs only, a scaler for the CPU. It skips a step that is not finite."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    accelerator.native_amp = True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    return accelerator.scaler


def flat(tree, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries and lists by their paths; numbers as tensors."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: value for name, part in items for key, value in flat(part, f"{prefix}/{name}").items()}
    return {prefix: tree} if isinstance(tree, torch.Tensor) else {prefix: torch.tensor(hash(tree))}
