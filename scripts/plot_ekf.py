"""Draw what a diagonal EKF knows of a one-layer network's weights: docs/ekf.png, the picture of docs/ekf.md.

    python scripts/plot_ekf.py

Ten classes of 8x8 digits, 640 weights, one sample at a time, each seen once. Takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

import koala

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DIGIT, SHOWN = 3, (10, 100, 1000)  # the class whose weights are drawn, and after how many samples
BLOCKS = {"block_size": 64, "likelihood": "categorical", "r": 0.0}
FILTERS = {
    "diagonal": ("diagonal-ekf", {"p0": 0.5}),
    "a block for each class, lambda = 1": ("lkf", {**BLOCKS, "lam": 1.0}),
    "a block for each class, RLEKF's lambda": ("lkf", BLOCKS),
}


def stream() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits in a random order: pixels from 0 to 1, [1797, 64], and classes."""
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float64)[order] / 16, torch.tensor(digits.target)[order]


def run(name: str, hyper: dict) -> tuple[list[bool], dict[int, torch.Tensor], torch.Tensor]:
    """Whether each sample was classified wrongly before it was learnt, p [64] after some, and the last weights [64]."""
    model = nn.Linear(64, 10, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = koala.create_optimizer(name, model.parameters(), **hyper)
    wrong, shown = [], {}
    for count, (x, y) in enumerate(zip(*stream(), strict=True), start=1):
        outputs, _ = optimizer.step(lambda x=x, y=y: (model(x[None]), y[None]))
        wrong.append(int(outputs.argmax()) != int(y))
        if count in SHOWN and name == "diagonal-ekf":
            shown[count] = optimizer.state[model.weight]["p"][DIGIT].clone()
    return wrong, shown, model.weight.detach()[DIGIT]


def draw(path: Path) -> None:
    runs = {name: run(*settings) for name, settings in FILTERS.items()}
    inputs, targets = stream()
    figure = plt.figure(figsize=(5, 7.2), layout="constrained")  # narrow: read on a phone, too
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    *axes, spare = top.subplots(2, 3).flat
    spare.axis("off")
    _, shown, weights = runs["diagonal"]
    axes[0].imshow(inputs[targets == DIGIT].mean(0).view(8, 8), cmap="Greys")
    axes[0].set_title(f"mean {DIGIT}", fontsize=9)
    for axis, (count, p) in zip(axes[1:], shown.items(), strict=False):
        image = axis.imshow(p.view(8, 8), cmap="viridis", norm=matplotlib.colors.LogNorm(0.03, 0.5))
        axis.set_title(f"p after {count}", fontsize=9)
    top.colorbar(image, ax=axes[-2], fraction=0.05)
    largest = weights.abs().max()
    image = axes[-1].imshow(weights.view(8, 8), cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes[-1].set_title(f"weights after {len(inputs)}", fontsize=9)
    top.colorbar(image, ax=axes[-1], fraction=0.05)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    axis = bottom.subplots()
    for (name, (wrong, _, _)), colour in zip(runs.items(), ("#1f6f8b", "#d1495b", "#3c6e47"), strict=True):
        errors = torch.tensor(wrong, dtype=torch.float64).cumsum(0)
        axis.plot(errors, color=colour, linewidth=1.2, label=f"{name}: {int(errors[-1])} of {len(wrong)}")
    axis.set_xlabel("samples")
    axis.set_ylabel("errors so far, each judged\nbefore it is learnt")
    bottom.legend(loc="outside lower left", frameon=False)
    axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "ekf.png")
    draw(parser.parse_args().out)
