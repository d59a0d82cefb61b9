"""Where a step's time goes with several ranks, what the filter adds to what is reduced, what that predicts at scale.

    python scripts/benchmark_ranks.py                    CPU, gloo, 2 and 4 ranks: measure, fit, check the model
    python scripts/benchmark_ranks.py --predict          only the page's table for clusters, from the model

Model (docs/clusters.md): an all-reduce of B bytes over N ranks costs  T(N, B) = 2 (N - 1) (a + B / (N b)),  with a
the latency of a message and b the bandwidth of a rank's link; a ring sends 2 (N - 1) messages of B / N bytes.
Every time is that of the slowest rank: it is taken up to a barrier at its end.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

from koala import LossStats, models
from koala.runs import compose
from koala.training.optimizers import build_optimizer

MODEL = ["data=cifar100", "model=resnet18", "model.width=16", "logger=none", "num_gpus=0"]
BATCH = 16  # images of a rank
SIZES = [8, 2**16, 2**20, 2**22]  # bytes, to fit latency and bandwidth


class Counter:
    """Bytes given to all_reduce from Python; DDP's own reductions run in C++, and are counted by parameters."""

    def __init__(self):
        self.calls = self.bytes = 0
        self.all_reduce, dist.all_reduce = dist.all_reduce, self.count

    def count(self, tensor, *args, **kwargs):
        self.calls, self.bytes = self.calls + 1, self.bytes + tensor.numel() * tensor.element_size()
        return self.all_reduce(tensor, *args, **kwargs)


def seconds(run) -> float:
    """Wall time of ``run()`` on the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - began


def medians(runs: dict, rounds: int) -> dict:
    """Median time of each of ``runs``, in turn, so that what else the machine does hits all of them alike."""
    times = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            taken = seconds(run)
            if number >= 2:  # the first rounds allocate
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


class Step:
    """A training step of one optimizer on this rank's own images."""

    def __init__(self, optim: str, rank: int, counter: Counter):
        cfg = compose([*MODEL, f"optim={optim}"])
        torch.manual_seed(0)
        self.module = models.build(cfg.model, kind="images", num_classes=100, input_shape=(3, 32, 32))
        self.net = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.optimizer = build_optimizer(cfg.optim, cfg.wrapper, self.module)
        self.filtered, self.counter = hasattr(self.optimizer, "diagnostics"), counter
        torch.manual_seed(rank)
        self.images, self.labels = torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))

    def backward(self, net):
        """Forward and backward through the DDP wrapper, which reduces gradients, or the bare module."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = F.cross_entropy(net(self.images), self.labels, reduction="none")
        losses.mean().backward()
        return LossStats.from_losses(losses) if self.filtered else losses.mean().detach()

    def step(self):
        """A whole step."""
        self.optimizer.step(lambda: self.backward(self.net))

    def reduced(self) -> tuple[int, int]:
        """Calls and bytes that one step adds to DDP's own reductions."""
        before = self.counter.calls, self.counter.bytes
        self.step()
        return self.counter.calls - before[0], self.counter.bytes - before[1]


def worker(rank: int, world: int, rounds: int, folder: str) -> None:
    """One rank: measures reductions of several sizes, then steps of SGD and KOALA-M, part by part, interleaved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    barrier = medians({"barrier": lambda: None}, rounds)["barrier"]
    sizes = {size: partial(dist.all_reduce, torch.ones(size // 4)) for size in SIZES}
    reduce = {size: max(0.0, taken - barrier) for size, taken in medians(sizes, 3 * rounds).items()}
    counter = Counter()
    steps = {optim: Step(optim, rank, counter) for optim in ("sgd", "koala-m")}
    runs = {}
    for optim, step in steps.items():
        runs[f"{optim} compute"] = partial(step.backward, step.module)
        runs[f"{optim} compute+reduce"] = partial(step.backward, step.net)
        runs[f"{optim} step"] = step.step
    parts = {name: taken - barrier for name, taken in medians(runs, rounds).items()}
    gradient_bytes = sum(p.numel() * p.element_size() for p in steps["sgd"].module.parameters())
    result = {
        "world": world,
        "reduce": reduce,
        "gradient_bytes": gradient_bytes,
        "parts": parts,
        "extra": {optim: step.reduced() for optim, step in steps.items()},
    }
    if rank == 0:
        (Path(folder) / f"{world}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def fit(result: dict) -> tuple[float, float]:
    """Latency a (s) and bandwidth b (bytes/s) of the model, from the smallest and the largest message."""
    world = result["world"]
    times = {int(size): seconds for size, seconds in result["reduce"].items()}
    small, large = min(times), max(times)
    bandwidth = 2 * (world - 1) / world * (large - small) / (times[large] - times[small])
    return times[small] / (2 * (world - 1)), bandwidth


def all_reduce(world: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes."""
    return 2 * (world - 1) * (latency + size / (world * bandwidth))


def report(result: dict) -> None:
    """Prints a world's measurements beside the model's predictions from the fit."""
    world, parts = result["world"], result["parts"]
    latency, bandwidth = fit(result)
    print(f"\n{world} ranks: latency {latency * 1e6:.0f} us a message, bandwidth {bandwidth / 1e9:.2f} GB/s a rank")
    for size, seconds in result["reduce"].items():
        print(
            f"  all-reduce of {int(size):>9,} bytes: {seconds * 1e3:8.2f} ms, model "
            f"{all_reduce(world, int(size), latency, bandwidth) * 1e3:8.2f} ms"
        )
    for optim in ("sgd", "koala-m"):
        calls, extra = result["extra"][optim]
        compute, reduced, step = (parts[f"{optim} {part}"] for part in ("compute", "compute+reduce", "step"))
        predicted = compute + all_reduce(world, result["gradient_bytes"], latency, bandwidth)
        print(
            f"  {optim:<8} compute {compute * 1e3:6.1f} ms, + gradients ({result['gradient_bytes'] / 1e6:.1f} MB) "
            f"{reduced * 1e3:6.1f} ms (model, no overlap: {predicted * 1e3:.1f}), whole step {step * 1e3:6.1f} ms; "
            f"beside gradients: {calls} all-reduce of {extra} bytes"
        )


# Assumed machine: nodes of 8 GPUs with NVLink, 400 Gb/s a GPU between nodes; (latency in s, bandwidth in bytes/s).
NVLINK, NETWORK = (3e-6, 300e9), (8e-6, 45e9)
# Assumed GPU, s a step of 128 images in bf16: forward and backward; SGD's update; KOALA-M's.
RESNET50 = {"parameters": 25.6e6, "compute": 0.050, "sgd": 0.0010, "koala-m": 0.0015}


def hierarchical(world: int, size: float) -> float:
    """All-reduce within nodes of 8, then a tree for the latency and a ring for the bytes between them."""
    inside, nodes = min(world, 8), max(1, world // 8)
    seconds = all_reduce(inside, size, *NVLINK)
    if nodes > 1:
        latency, bandwidth = NETWORK
        depth = (nodes - 1).bit_length()
        seconds += 2 * depth * latency + 2 * (nodes - 1) / nodes * (size / inside) / bandwidth
    return seconds


def predict() -> None:
    """Prints the page's table: ResNet-50, 128 images a GPU, float32 gradients partly hidden by the backward pass."""
    size, compute = 4 * RESNET50["parameters"], RESNET50["compute"]
    hidden = compute / 3  # reducing starts with the first full bucket, and half of the backward pass is left by then
    columns = "GPUs|gradients|not hidden|FSDP's traffic|filter's all-reduce|step with SGD|step with KOALA-M|overhead"
    print("| " + " | ".join(columns.split("|")) + " |\n" + "|---:" * 8 + "|")
    for world in (1, 2, 8, 64, 256, 1024):
        gradients, scalars = (hierarchical(world, bytes_) if world > 1 else 0.0 for bytes_ in (size, 24))
        exposed = max(0.0, gradients - hidden)
        sgd = compute + exposed + RESNET50["sgd"]
        koala = compute + exposed + RESNET50["koala-m"] + scalars
        cells = [gradients, exposed, 1.5 * gradients, scalars, sgd, koala]
        print(f"| {world:,} | " + " | ".join(f"{cell * 1e3:.2f}" for cell in cells) + f" | {koala / sgd - 1:.1%} |")


def main() -> None:
    """Measures for each number of ranks, then compares with the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--predict", action="store_true", help="print the table for clusters and measure nothing")
    options = parser.parse_args()
    if options.predict:
        predict()
        return
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (world, options.rounds, folder), nprocs=world)
            report(json.loads((Path(folder) / f"{world}.json").read_text()))


if __name__ == "__main__":
    main()
