"""Draw what a filter does during a run: docs/filter.png, the figure of docs/filter.md.

    python scripts/plot_filter.py

A small network learns the digits of scikit-learn with KOALA-V and KOALA-M; lr drops to a tenth at two thirds of
the run. Takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

import koala

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

EPOCHS, BATCH = 9, 64


def record(optimizer_name: str, covariance: str, **hyper) -> dict[str, list[float]]:
    """Loss, noise, covariance and gain of every step of one run."""
    torch.manual_seed(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = koala.create_optimizer(optimizer_name, model.parameters(), **hyper)
    steps = EPOCHS * (len(inputs) // BATCH)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * steps // 3], gamma=0.1)
    seen: dict[str, list[float]] = {"loss": [], "R": [], "covariance": [], "gain": []}
    for _ in range(EPOCHS):
        for index in torch.randperm(len(inputs))[: steps // EPOCHS * BATCH].view(-1, BATCH):

            def closure(index=index):
                optimizer.zero_grad()
                losses = F.cross_entropy(model(inputs[index]), targets[index], reduction="none")
                losses.mean().backward()
                return losses

            loss = optimizer.step(closure).mean()
            state = {key: value.item() for key, value in optimizer.diagnostics().items()}
            seen["loss"].append(loss.item())
            seen["R"].append(state["R"])
            seen["covariance"].append(state[covariance])
            seen["gain"].append(state["gain"])
            scheduler.step()
    return seen


def draw(path: Path) -> None:
    runs = {
        "KOALA-V": record("koala-v", "s", sigma=0.1, q=1.0),
        "KOALA-M": record("koala-m", "P11"),
    }
    rows = {
        "loss": "loss L",
        "R": "noise R",
        "covariance": "covariance  s, P₁₁",
        "gain": "gain  s |h|² / S",
    }
    figure, axes = plt.subplots(len(rows), 1, figsize=(5, 7), sharex=True, layout="constrained")
    for axis, (key, label) in zip(axes, rows.items(), strict=True):
        for (name, seen), colour in zip(runs.items(), ("#1f6f8b", "#d1495b"), strict=True):
            axis.plot(seen[key], color=colour, linewidth=0.9, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.axvline(2 * len(seen[key]) // 3, color="grey", linestyle=":", linewidth=1)
        if key != "gain":
            axis.set_yscale("log")
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step (dotted: lr drops to a tenth)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "filter.png")
    draw(parser.parse_args().out)
