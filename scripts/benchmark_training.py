"""Our training loop against the plain PyTorch loop that people write: images and tokens a second on this machine.

    python scripts/benchmark_training.py                                   # both, on all cores
    python scripts/benchmark_training.py --task images --width 16 --repeats 3

Images: ResNet-18 for 32 x 32 images, batch 128, SGD. The plain loop has a DataLoader with worker processes, transforms
of one image at a time, the contiguous layout, and reads loss and accuracy at every step (`.item()`).
Tokens: tiny-LSTM as on Penn Treebank (10,000 words, batch 20 x 35), SGD, clipping. The plain loop is that of PyTorch's
word-language-model example: log-softmax in the model, NLLLoss, `.item()` at every step.

Each arm trains the same network on random data of one shape (what is in it does not change the speed) in a process of
its own, arms in turn (A B A B ...). It trains two epochs of `--steps` steps: the first warms up, the second is timed,
without its evaluation. Medians and ratios go to results/benchmarks/training.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

from koala import models, records  # noqa: E402
from koala.runs import compose, launch, run_dir  # noqa: E402

IMAGES, CLASSES = 128, 100  # a step
COLUMNS, BPTT, WORDS = 20, 35, 10_000
WORKERS = 2  # of the plain loop's DataLoader
NETWORK = {"images": ["data=cifar100", "model=resnet18"], "tokens": ["data=ptb", "model=tiny-lstm"]}


def pixels(count: int) -> np.ndarray:
    """Random images, uint8 [count, 32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def words(count: int) -> np.ndarray:
    """Random words, int64 [count >= WORDS]; each occurs, so that the vocabulary has its full size."""
    draw = np.random.default_rng(0)
    return np.concatenate([draw.permutation(WORDS), draw.integers(0, WORDS, count - WORDS)])


def write_images(folder: Path, steps: int) -> None:
    """Parquet files with the columns of the hub's CIFAR-100."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.Value("int64")})
    for split, count in (("train", steps * IMAGES), ("test", IMAGES)):
        rows = {"img": list(pixels(count)), "fine_label": [index % CLASSES for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def write_tokens(folder: Path, steps: int) -> None:
    """Text files of one line; the training stream, its `<eos>` included, is `steps` steps long."""
    train = words(COLUMNS * (steps * BPTT + 1) - 1)
    for name, line in (("train", train), ("valid", train[:200]), ("test", train[:200])):
        (folder / f"{name}.txt").write_text(" ".join(f"w{word}" for word in line) + "\n")


def through_launch(task: str, options: argparse.Namespace, precision: str, folder: Path) -> float:
    """Seconds of the second epoch of a run through `launch`, as its history has them."""
    with tempfile.TemporaryDirectory() as outputs:
        cfg = configuration(task, options, precision, folder, outputs)
        launch(cfg)
        first, second = records.read_history(run_dir(cfg))
        return second["seconds"] - first["seconds"]


def configuration(task, options, precision: str, folder: Path, outputs: str, optim: str = "sgd", epochs: int = 2):
    """Of a run on the data in `folder`."""
    return compose([
        *NETWORK[task], *width(task, options), f"data.path={folder}", f"optim={optim}", "schedule=constant",
        f"epochs={epochs}", f"precision={precision}", f"num_gpus={int(torch.cuda.is_available())}", "logger=none",
        "select=last", f"output_root={outputs}", f"data_root={folder}",
    ])  # fmt: skip


def width(task: str, options: argparse.Namespace) -> list[str]:
    """The override that narrows ResNet-18 for small machines."""
    return [f"model.width={options.width}"] if task == "images" else []


class PlainImages(Dataset):
    """Images in memory, each made from its array and transformed when asked for, as torchvision.datasets.CIFAR100."""

    def __init__(self, count: int):
        self.images = pixels(count)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), index % CLASSES


def plain_images(options: argparse.Namespace, precision: str, folder: Path) -> float:
    """Seconds of the second epoch of the loop that every tutorial has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = compose([*NETWORK["images"], *width("images", options)])
    model = models.build(cfg.model, kind="images", num_classes=CLASSES, input_shape=(3, 32, 32)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optim.lr, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        PlainImages(options.steps * IMAGES),
        IMAGES,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    criterion = torch.nn.CrossEntropyLoss()
    for _ in range(2):
        start, total, correct = time.perf_counter(), 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
                loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
        seconds = time.perf_counter() - start
    return seconds


def plain_tokens(options: argparse.Namespace, precision: str, folder: Path) -> float:
    """Seconds of the second epoch of the loop of PyTorch's word-language-model example."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = compose(NETWORK["tokens"])
    model = models.build(cfg.model, kind="text", num_classes=WORDS, input_shape=(BPTT,)).to(device)
    length = options.steps * BPTT + 1
    source = torch.from_numpy(words(COLUMNS * length)).view(COLUMNS, length).to(device)
    for _ in range(2):
        start, total, state = time.perf_counter(), 0.0, None
        model.train()
        for begin in range(0, length - 1, BPTT):
            data, targets = source[:, begin : begin + BPTT], source[:, begin + 1 : begin + 1 + BPTT].reshape(-1)
            model.zero_grad()
            state = state and tuple(part.detach() for part in state)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output, state = model(data, state)
                loss = F.nll_loss(F.log_softmax(output.view(-1, WORDS), dim=1), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.1)
            total += loss.item()
        seconds = time.perf_counter() - start
    return seconds


def ours_images(options: argparse.Namespace, precision: str, folder: Path) -> float:
    """See `through_launch`."""
    return through_launch("images", options, precision, folder)


def ours_tokens(options: argparse.Namespace, precision: str, folder: Path) -> float:
    """See `through_launch`."""
    return through_launch("tokens", options, precision, folder)


ARMS = {"images": (plain_images, ours_images), "tokens": (plain_tokens, ours_tokens)}
PER_STEP = {"images": IMAGES, "tokens": COLUMNS * BPTT}


def in_process(arm: Callable, *arguments) -> float:
    """Runs an arm in a fresh process: its threads, allocator settings and caches are its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, arm, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{arm.__name__} failed; its error is above") from None
    finally:
        process.join()


def _send(sender, arm: Callable, *arguments) -> None:
    torch.backends.cudnn.allow_tf32 = False  # torch's default is True; fp32 is the same arithmetic in all arms
    sender.send(arm(*arguments))


def measure(task: str, options: argparse.Namespace) -> dict:
    """Rates (a second) of every arm and precision, and the median ratios of arms that ran one after the other."""
    rates = {f"{arm.__name__.split('_')[0]} {precision}": [] for precision in options.precision for arm in ARMS[task]}
    with tempfile.TemporaryDirectory() as folder:
        {"images": write_images, "tokens": write_tokens}[task](Path(folder), options.steps)
        for repeat in range(options.repeats):
            for precision in options.precision:
                for arm in ARMS[task]:
                    rate = options.steps * PER_STEP[task] / in_process(arm, options, precision, Path(folder))
                    rates[f"{arm.__name__.split('_')[0]} {precision}"].append(rate)
                    name = f"{arm.__name__} {precision}"
                    print(f"{task} repeat {repeat + 1}/{options.repeats}  {name}: {rate:,.0f} {task}/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    pairs = {precision: (f"ours {precision}", f"plain {precision}") for precision in options.precision}
    if {"fp32", "bf16"} <= set(options.precision):
        pairs["ours bf16 / plain fp32"] = ("ours bf16", "plain fp32")
    ratios = {name: paired(rates[ours], rates[plain]) for name, (ours, plain) in pairs.items()}
    return {"unit": f"{task}/s", "median": medians, "runs": rates, "ratio": ratios}


def paired(ours: list[float], plain: list[float]) -> float:
    """Median ratio within a repeat: neighbours in time, so that a machine's changing load does not count."""
    return statistics.median(one / other for one, other in zip(ours, plain, strict=True))


def machine() -> dict:
    """What the numbers belong to."""
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=[*ARMS, "both"], default="both")
    parser.add_argument("--width", type=int, default=64, help="of ResNet-18's first layer [64]")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process [all cores]")
    parser.add_argument("--steps", type=int, help="timed steps in each run [10 of images, 40 of tokens]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "training.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure
    tasks = list(ARMS) if options.task == "both" else [options.task]
    if "tokens" in tasks and options.steps is not None and options.steps * COLUMNS * BPTT < WORDS:
        least = -(-WORDS // (COLUMNS * BPTT))
        parser.error(f"--steps {options.steps}: tokens need at least {least}, for all {WORDS} words to occur")
    given, results = options.steps, {}
    for task in tasks:
        options.steps = given or {"images": 10, "tokens": 40}[task]
        results[task] = {"steps": options.steps, "repeats": options.repeats, "threads": options.threads}
        results[task] |= {"width": options.width} if task == "images" else {}
        results[task] |= measure(task, options) | {"machine": machine()}
        for name, ratio in results[task]["ratio"].items():
            print(f"{task}: ours / plain, {name}: {ratio:.2f}x")
    earlier = json.loads(options.output.read_text()) if options.output.exists() else {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(earlier | results, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
