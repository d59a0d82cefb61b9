"""What a filter costs end to end: KOALA-M over SGD, step by step, through our training loop on this machine.

    python scripts/benchmark_filter.py --threads 1                    # ResNet-18 and tiny-LSTM
    python scripts/benchmark_filter.py --task tokens --optim koala++

Two processes train the same network on the same random data, one with SGD, one with the filter, and take turns: step
by step, each waits while the other works. A step counts from asking for its batch to asking for the next one, so all
that the loop does is in it. What else the machine does falls on both, and a ratio is that of two neighbours in time;
what is printed is their median and quartiles. Results go to results/benchmarks/filter.json.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import benchmark_training as training  # which makes koala importable
import torch

from koala import data

WARM = 3  # steps that choose algorithms and fill caches


def paced(epoch, turn, next_turn, seconds: list[float]):
    """A source's `epoch` whose batches wait for their turn and note how long their steps take."""

    def batches(*args):
        source = epoch(*args)
        while True:
            turn.acquire()
            start = time.perf_counter()
            try:
                batch = next(source, None)
                if batch is None:
                    return
                yield batch
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            finally:
                next_turn.release()

    return batches


def train(sender, task: str, optim: str, options: argparse.Namespace, folder: str, turn, next_turn) -> None:
    """A run through `launch`; sends the seconds of its steps."""
    build, seconds = data.build, []

    def paced_build(*args, **kwargs):
        built = build(*args, **kwargs)
        built.train.epoch = paced(built.train.epoch, turn, next_turn, seconds)
        return built

    data.build = paced_build
    with tempfile.TemporaryDirectory() as outputs:
        training.launch(training.configuration(task, options, options.precision, Path(folder), outputs, optim, 1))
    sender.send(seconds)


def pair(task: str, options: argparse.Namespace, folder: str) -> list[list[float]]:
    """Seconds of each step, of SGD and of the filter."""
    context = multiprocessing.get_context("spawn")
    turns = context.Semaphore(1), context.Semaphore(0)
    receivers, processes = [], []
    for i, optim in enumerate(("sgd", options.optim)):
        receiver, sender = context.Pipe(duplex=False)
        args = (sender, task, optim, options, folder, turns[i], turns[1 - i])
        processes.append(context.Process(target=train, args=args))
        processes[-1].start()
        sender.close()
        receivers.append(receiver)
    try:
        return [receiver.recv() for receiver in receivers]
    except EOFError:
        raise SystemExit("a run failed; its error is above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def measure(task: str, options: argparse.Namespace) -> dict:
    ratios, medians, milliseconds = [], [], {"sgd": [], options.optim: []}
    steps = options.steps or {"images": 20, "tokens": 150}[task]
    with tempfile.TemporaryDirectory() as folder:
        {"images": training.write_images, "tokens": training.write_tokens}[task](Path(folder), steps)
        for repeat in range(options.repeats):
            plain, filtered = (seconds[WARM:] for seconds in pair(task, options, folder))
            run = [b / a for a, b in zip(plain, filtered, strict=True)]
            ratios += run
            medians.append(statistics.median(run))
            milliseconds["sgd"].append(1e3 * statistics.median(plain))
            milliseconds[options.optim].append(1e3 * statistics.median(filtered))
            print(f"{task} {repeat + 1}/{options.repeats}: {options.optim} / sgd {medians[-1]:.3f}", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{task}: {options.optim} / sgd {middle:.3f} (quartiles {low:.3f} to {high:.3f}, n = {len(ratios)} steps)")
    return {
        "optim": options.optim, "precision": options.precision, "threads": options.threads, "steps": len(ratios),
        "ratio": middle, "quartiles": [low, high], "ratio_of_runs": medians, "step_ms": milliseconds,
        "width": options.width if task == "images" else None, "machine": training.machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", nargs="+", choices=["images", "tokens"], default=["images", "tokens"])
    parser.add_argument("--optim", default="koala-m", help="[koala-m]")
    parser.add_argument("--width", type=int, default=64, help="of ResNet-18's first layer [64]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process [all cores]")
    parser.add_argument("--steps", type=int, help="in each run [20 of images, 150 of tokens]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=training.ROOT / "results" / "benchmarks" / "filter.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that they end with this one
    results = {task: measure(task, options) for task in options.task}
    earlier = json.loads(options.output.read_text()) if options.output.exists() else {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(earlier | results, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    sys.exit(main())
