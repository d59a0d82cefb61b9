"""What a step on LoRA factors takes: the filters of outputs beside AdamW and KOALA-M.

    python scripts/benchmark_ekf.py
    python scripts/benchmark_ekf.py --device cuda --batch-size 8

A ResNet-18 with about 100,000 trainable weights in LoRA factors and head, images of 32x32, ten classes. Prints the
median time of a step with its forward and backward passes, the peak of memory above the model's in bytes per trained
weight (GPUs only), and the optimizer's state in bytes per trained weight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

import koala
from koala import models
from koala.runs import compose

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "KOALA-M": lambda params: koala.MomentumKOALA(params),
    "diagonal EKF": lambda params: koala.DiagonalEKF(params),
    "diagonal EKF, one row at a time": lambda params: koala.DiagonalEKF(params, chunk_size=1),
    "LKF, blocks of 64": lambda params: koala.LayerwiseEKF(params, 64, likelihood="categorical", r=0.0, lam=1.0),
}


def lora(device: str) -> torch.nn.Module:
    """The network, most of it frozen."""
    chosen = ["data=cifar10", "model=resnet18-lora", "model.base.width=32", "model.rank=6", "num_gpus=0"]
    torch.manual_seed(0)
    network = models.build(compose(chosen).model, kind="images", num_classes=10, input_shape=(3, 32, 32))
    return network.to(device).train()


def measure(name: str, device: str, batch_size: int, steps: int) -> str:
    """One row of the table."""
    model = lora(device)
    cuda = torch.device(device).type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    params = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in params)
    optimizer = OPTIMIZERS[name](params)
    inputs = torch.randn(batch_size, 3, 32, 32, device=device)
    targets = torch.randint(10, (batch_size,), device=device)

    def closure():
        outputs = model(inputs)
        if isinstance(optimizer, koala.OutputFilter):
            return outputs, targets
        optimizer.zero_grad()
        loss = F.cross_entropy(outputs, targets)
        loss.backward()
        return loss

    seconds = []
    for _ in range(steps + 2):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step(closure)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = f"{(torch.cuda.max_memory_allocated() - before) / count:.1f}" if cuda else "-"
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    state = sum(value.numel() * value.element_size() for value in tensors) / count
    return f"| {name} | {count:,} | {1e3 * statistics.median(seconds[2:]):.1f} | {peak} | {state:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    print("| optimizer | weights | ms a step | peak bytes per weight | state bytes per weight |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in OPTIMIZERS:
        if torch.device(given.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        print(measure(name, given.device, given.batch_size, given.steps), flush=True)


if __name__ == "__main__":
    main()
