"""Time a full optimizer step (predict and update) on real gradients, against torch's own optimizers.

    python scripts/benchmark_optimizers.py --threads 2 --repeats 15 --output results/benchmarks/optimizers.json
    python scripts/benchmark_optimizers.py --device cuda          # also replays of CUDA graphs, launches and waits

Gradients come from backward passes of the real model on several random batches and are rotated. All optimizers take
turns within each repeat, so that whatever else the machine does falls on all of them, and each finds caches that hold
nothing of the model, whichever came before it; a ratio is the median over repeats of time / time of fused SGD with
momentum in the same repeat. Rates are so small that the weights stay put.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whichever koala is installed

import koala

LR = 1e-7
CACHES = 1 << 28  # bytes, more than any cache
REFERENCE = "SGD momentum, fused"
IMPLEMENTATIONS = ["portable", "fused", "graph"]  # fused: by C++ or Triton; graph: that, captured
PASSES = {"SGD momentum": 5, "Adam": 7}  # as passes_of, of torch's


class Transformer(nn.Module):
    """A decoder of about 60 million weights with tied embeddings."""

    def __init__(self, vocabulary: int = 32_000, width: int = 640, layers: int = 8, heads: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        return F.linear(self.layers(self.embedding(tokens), mask=mask, is_causal=True), self.embedding.weight)


class LSTM(nn.Module):
    """The papers' tiny language model: two layers of 200, tied embeddings, Penn Treebank's vocabulary."""

    def __init__(self, vocabulary: int = 10_000, width: int = 200) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.lstm(self.embedding(tokens))[0], self.embedding.weight)


def images(model: nn.Module, device: torch.device) -> Tensor:
    inputs = torch.randn(8, 3, 64, 64, device=device)
    return F.cross_entropy(model(inputs), torch.randint(1000, (8,), device=device), reduction="none")


def tokens(vocabulary: int) -> Callable[[nn.Module, torch.device], Tensor]:
    def losses(model: nn.Module, device: torch.device) -> Tensor:
        stream = torch.randint(vocabulary, (4, 33), device=device)
        return F.cross_entropy(model(stream[:, :-1]).flatten(0, 1), stream[:, 1:].flatten(), reduction="none")

    return losses


MODELS = {
    "resnet18": (torchvision.models.resnet18, images),
    "wrn50-2": (torchvision.models.wide_resnet50_2, images),
    "tiny-lstm": (LSTM, tokens(10_000)),
    "transformer-60m": (Transformer, tokens(32_000)),
}


def gradient_sets(model: nn.Module, losses, device: torch.device, count: int = 3) -> tuple[list[list[Tensor]], Tensor]:
    """Gradients of several batches, and the per-sample losses of the last."""
    sets = []
    for _ in range(count):
        model.zero_grad()
        batch = losses(model, device)
        batch.mean().backward()
        sets.append([p.grad.clone() for p in model.parameters()])
    return sets, batch.detach()


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as the replay of a CUDA graph. It reads the gradients that are there now, wherever they are later."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and state is made before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graphs(params: list[Tensor], losses: Tensor) -> dict:
    """The same optimizers as `candidates`, each with a state of its own, captured."""
    sgd = torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=5e-4, fused=True)
    adam = torch.optim.Adam(params, lr=LR, weight_decay=5e-4, fused=True, capturable=True)
    steps = {"SGD momentum, graph": (sgd, graphed(sgd.step)), "Adam, graph": (adam, graphed(adam.step))}
    rate = torch.tensor(LR, dtype=torch.float64, device=losses.device)  # so that a schedule can move it
    stats = koala.LossStats.from_losses(losses)
    for info in (info for info in koala.list_optimizers() if info.observes != "outputs"):
        optimizer = koala.create_optimizer(info.name, params, lr=rate, weight_decay=5e-4)

        def step(optimizer=optimizer):
            optimizer.predict()
            optimizer.update(stats)

        steps[f"{info.name}, graph"] = (optimizer, graphed(step))
    return steps


def candidates(params: list[Tensor], losses: Tensor, implementations: list[str]):
    """(name, implementation) -> (optimizer, step). One optimizer serves both implementations: its state is shared."""
    steps = graphs(params, losses) if "graph" in implementations else {}
    loss, loss_var = losses.mean(), losses.square().mean()
    for style in ("foreach", "fused"):
        sgd = torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=5e-4, **{style: True})
        steps[f"SGD momentum, {style}"] = (sgd, sgd.step)
        adam = torch.optim.Adam(params, lr=LR, weight_decay=5e-4, **{style: True})
        steps[f"Adam, {style}"] = (adam, adam.step)
    for info in (info for info in koala.list_optimizers() if info.observes != "outputs"):
        optimizer = koala.create_optimizer(info.name, params, lr=LR, weight_decay=5e-4)
        for implementation in [each for each in implementations if each != "graph"]:

            def step(optimizer=optimizer, implementation=implementation):
                optimizer.fused = implementation == "fused"
                optimizer.predict()
                optimizer.update(loss, loss_var)

            steps[f"{info.name}, {implementation}"] = (optimizer, step)
    return steps


def clock(step: Callable[[], object], device: torch.device, other: Tensor) -> float:
    """Seconds of a step that finds ``other`` in the caches."""
    other.sum()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def passes_of(algorithm: str) -> int:
    """Weight-sized tensors read or written in a step with weight decay, if each pass went through memory once."""
    if algorithm in PASSES:
        return PASSES[algorithm]
    (info,) = (info for info in koala.list_optimizers() if info.name == algorithm)
    measured = {name for pair in info.cls.products for name in pair} - {"h"} | {"x", "g"}
    applied = 3 + 2 * info.buffers  # reads weights, gradients and buffers; writes weights and buffers
    return len(measured) + applied + (2 + info.buffers) * info.moves_on_predict


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that grow with the weights."""
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()]
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_extra_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most memory that one step holds beyond what was there before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    records = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(records, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(step: Callable[[], object]) -> dict[str, int]:
    """Kernels that one step runs on CUDA, what the host launches for them, and how often it waits."""

    def counted(work: Callable[[], object]) -> dict[str, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        events = profile.events()
        on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        on_host = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU]
        return {
            "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in on_device),
            "launches": sum("LaunchKernel" in name or "GraphLaunch" in name for name in on_host),
            "waits": sum("Synchronize" in name for name in on_host),
        }

    idle, busy = counted(lambda: None), counted(step)  # the profiler waits as well
    return {what: number - idle[what] for what, number in busy.items()}


def benchmark(name: str, device: torch.device, repeats: int, implementations: list[str]) -> dict:
    """Measure every optimizer on one model; times in seconds."""
    torch.manual_seed(0)
    make, losses = MODELS[name]
    model = make().to(device)
    sets, batch = gradient_sets(model, losses, device)
    params = list(model.parameters())
    for p, grad in zip(params, sets[0], strict=True):
        p.grad = grad
    weights = sum(p.numel() for p in params)
    steps = candidates(params, batch, implementations)
    source = [g.clone() for g in sets[0]]
    other = torch.ones(CACHES // 4, device=device)  # ones: zeros are one page, mapped over and over
    times: dict[str, list[float]] = {key: [] for key in ("copy", *steps)}
    for repeat in range(-2, repeats):  # two warm up and compile
        for p, grad in zip(params, sets[repeat % len(sets)], strict=True):
            p.grad = grad
        taken = {"copy": clock(lambda: [a.copy_(b) for a, b in zip(source, sets[1], strict=True)], device, other)}
        taken |= {key: clock(step, device, other) for key, (_, step) in steps.items()}
        if repeat >= 0:
            for key, seconds in taken.items():
                times[key].append(seconds)
    rows = []
    copied = 2 * 4 * weights / statistics.median(times["copy"])
    for key, (optimizer, step) in steps.items():
        algorithm = key.split(", ")[0]
        median = statistics.median(times[key])
        ratios = [taken / reference for taken, reference in zip(times[key], times[REFERENCE], strict=True)]
        moved = passes_of(algorithm) * 4 * weights / median
        rows.append({
            "optimizer": algorithm,
            "implementation": key.split(", ")[1],
            "median_seconds": median,
            "min_seconds": min(times[key]),
            "ratio_to_fused_sgd": statistics.median(ratios),
            "ratio_of_minima": min(times[key]) / min(times[REFERENCE]),
            "bytes_per_second": moved,
            "fraction_of_copy_bandwidth": moved / copied,
            "state_bytes_per_weight": state_bytes(optimizer) / weights,
            "peak_extra_bytes": peak_extra_bytes(step, device),
            **(launches(step) if device.type == "cuda" else {}),
        })  # fmt: skip
    return {
        "model": name,
        "weights": weights,
        "tensors": len(params),
        "largest_tensor_bytes": 4 * max(p.numel() for p in params),
        "copy_bytes_per_second": copied,
        "repeats": repeats,
        "rows": rows,
    }


def table(result: dict) -> str:
    lines = [
        f"{result['model']}: {result['weights']:,} weights in {result['tensors']} tensors; "
        f"copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s; n = {result['repeats']}",
        "optimizer      by        median ms   min ms  ratio of min   GB/s state B/w  extra MB"
        + ("  kernels launches waits" if "kernels" in result["rows"][0] else ""),
    ]
    for row in result["rows"]:
        milliseconds = f"{1e3 * row['median_seconds']:9.2f} {1e3 * row['min_seconds']:8.2f}"
        ratios = f"{row['ratio_to_fused_sgd']:6.2f} {row['ratio_of_minima']:6.2f}"
        memory = f"{row['state_bytes_per_weight']:9.2f} {row['peak_extra_bytes'] / 1e6:9.2f}"
        speed = f"{row['bytes_per_second'] / 1e9:6.1f}"
        counts = f"{row['kernels']:9} {row['launches']:8} {row['waits']:5}" if "kernels" in row else ""
        name = f"{row['optimizer']:14} {row['implementation']:9}"
        lines.append(f"{name} {milliseconds} {ratios} {speed} {memory}{counts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, help="default: all that the device has"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the measurements here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    every = IMPLEMENTATIONS if device.type == "cuda" else IMPLEMENTATIONS[:2]
    results = []
    for name in args.model:
        results.append(benchmark(name, device, args.repeats, args.implementations or every))
        print(table(results[-1]), end="\n\n", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        header = {"torch": torch.__version__, "threads": args.threads, "device": str(device), "machine": machine}
        args.output.write_text(json.dumps({**header, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
