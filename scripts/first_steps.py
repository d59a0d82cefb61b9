"""Whether the loss rises over the first steps: by model, clipping, learning rate, and what may prevent it.

    python scripts/first_steps.py --data cifar10=DIR > first_steps.jsonl      a line a run; one CPU core
    python scripts/first_steps.py --table first_steps.jsonl                   the table of docs/choosing.md

A run is `--steps` updates with the optimizer's defaults but for what its line names. `rise` is the highest minibatch
loss of updates 2 to 10 over the first one's; `end` the mean loss of the last five updates over the first one's.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import koala  # noqa: E402
from koala import data, models  # noqa: E402
from koala.data import Loading  # noqa: E402
from koala.runs import compose  # noqa: E402
from koala.training.tasks import build_task  # noqa: E402

PLAIN = "plain CNN"  # without normalisation; not one of the suite's models
TASKS = {
    "MLP, digits": ["data=digits", "model=mlp", "batch_size=50"],
    "ResNet-18 of width 16, CIFAR-10": ["data=cifar10", "model=resnet18", "model.width=16", "batch_size=50"],
    f"{PLAIN}, CIFAR-10": ["data=cifar10", "model=resnet18", "model.width=16", "batch_size=50"],
    "LSTM of width 64, Python's documentation": ["data=pydocs", "model=tiny-lstm", "model.width=64"],
    "GPT of width 64, Python's documentation": [
        "data=pydocs",
        "model=gpt-small",
        "model.width=64",
        "model.layers=2",
        "model.feedforward=192",
    ],
}
CLIPS, RATES = (0.0, 1.0, 0.25), (0.1, 0.3, 1.0, 4.0)  # 0: not clipped
FIRST = 10


def plain_cnn(classes: int) -> nn.Module:
    layers = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, classes))


def losses_of(task: str, clip: float, rate: float, warmup: int, optimizer: str, options: dict, steps: int,
              seed: int, paths: dict[str, str]) -> list[float]:  # fmt: skip
    """The minibatch loss before each update."""
    overrides = [*TASKS[task], "num_gpus=0", f"seed={seed}"]
    overrides += [f"data.path={paths[name]}" for name in paths if f"data={name}" in overrides]
    cfg = compose(overrides)
    source = data.build(cfg.data, Loading(seed, cfg.batch_size, data_root=cfg.data_root))
    torch.manual_seed(seed)
    classes = source.num_classes
    net = plain_cnn(classes) if task.startswith(PLAIN) else models.build(
        cfg.model, kind=source.kind, num_classes=classes, input_shape=source.input_shape)  # fmt: skip
    task_losses = build_task(cfg, classes).losses
    kalman = koala.create_optimizer(optimizer, net.parameters(), lr=rate, **options)
    history = []
    epochs = itertools.chain.from_iterable(source.train.epoch(epoch) for epoch in itertools.count())
    for step, batch in zip(range(steps), epochs, strict=False):
        for group in kalman.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))
        kalman.predict()
        kalman.zero_grad()
        losses, _ = task_losses(net, batch)
        kalman.observe(losses).backward()
        history.append(losses.mean().item())
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        kalman.update()
    return history


def measure(options: argparse.Namespace) -> None:
    """Prints a line of JSON for each run."""
    paths = dict(pair.split("=", 1) for pair in options.data)
    settings = json.loads(options.options)
    cases = itertools.product(options.tasks or TASKS, options.clips, options.rates, options.seeds)
    for task, clip, rate, seed in cases:
        run = {"task": task, "clip": clip, "rate": rate, "seed": seed, "warmup": options.warmup,
               "optimizer": options.optimizer, "options": settings, "steps": options.steps}  # fmt: skip
        losses = losses_of(task, clip, rate, options.warmup, options.optimizer, settings, options.steps, seed, paths)
        rise, end = max(losses[1:FIRST]) / losses[0], statistics.fmean(losses[-5:]) / losses[0]
        print(json.dumps(run | {"rise": rise, "end": end}), flush=True)


def table(path: Path) -> None:
    """Prints `rise, end`, means over the seeds: a row a task and clipping, a column a rate."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    rates = sorted({run["rate"] for run in runs})
    print("| model and data | gradients clipped at |", " | ".join(f"lr {rate:g}" for rate in rates), "|")
    print("| --- | --- |", " | ".join("---:" for _ in rates), "|")
    for task, clip in dict.fromkeys((run["task"], run["clip"]) for run in runs):
        cells = []
        for rate in rates:
            alike = [run for run in runs if (run["task"], run["clip"], run["rate"]) == (task, clip, rate)]
            rise, end = (statistics.fmean(run[name] for run in alike) for name in ("rise", "end"))
            cells.append(f"{rise:.2f}, {end:.2f}")
        print(f"| {task} | {clip or 'not'} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of these runs, and run nothing")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=DIR", help="local copy of a data set")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--clips", nargs="+", type=float, default=CLIPS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=0, help="updates over which lr rises linearly")
    parser.add_argument("--optimizer", default="koala-m")
    parser.add_argument("--options", default="{}", help="other arguments of the optimizer, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        table(options.table)
    else:
        measure(options)


if __name__ == "__main__":
    main()
