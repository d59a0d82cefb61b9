"""What a run costs before it is run: FLOPs counted on its model, hours from a throughput.

FLOPs are those of one forward and backward pass, counted by torch on the model without data (meta device), times
the samples of the run, plus the forward passes of the evaluations, of which every run has one at its end. Hours follow
from a rate:
- a measured one, where results/measured has a record of the same data, model and precision (samples per second), a
  CPU's for a run on a CPU and a GPU's for one on GPUs;
- on a CPU, else the FLOP/s of the CPU records there are with images, or with text;
- on GPUs, else the paper's own: KOALA's supplement, Table 3 prints 3 h 40 min for 100 epochs of SGD, WRN-50-2 on
  CIFAR-100.
Some optimizers do more per step than one pass; KOALA++'s Table 1 gives each the epochs that take equal wall time,
which is the ratio used here.
"""

import functools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from koala.errors import ConfigError
from koala.runs import groups
from koala.tables.measured import read_all

# Samples (images; tokens of text) of each split that is trained on and evaluated every epoch, and classes or words.
SIZES = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet32": (1_281_167, 50_000, 1000),
    "imagenet": (1_281_167, 50_000, 1000),
    "oxford-pets": (3_680, 3_669, 37),
    "oxford-flowers": (2_040, 6_149, 102),
    "food101": (75_750, 25_250, 101),
    "digits": (1_257, 540, 10),
    "ptb": (929_589, 156_190, 10_000),
    "wikitext2": (2_088_628, 463_000, 33_278),
    "wikitext2-gpt1": (2_357_000, 530_000, 40_479),
    "pydocs": (95_000, 10_000, 5_000),
}
PAPER_SECONDS = 3 * 3600 + 40 * 60  # of 100 epochs of WRN-50-2 on CIFAR-100
EPOCHS_OF_EQUAL_TIME = {"adam": 210, "adahessian": 89, "shampoo": 36, "kfac": 107, "adafisher": 200}


@dataclass(frozen=True)
class Estimate:
    """Cost of one run, and where the rate comes from."""

    flops: float
    hours: float
    source: str


@dataclass(frozen=True)
class Rate:
    """Samples per second that were measured on `device` with the run configuration `config`."""

    samples: float
    device: str
    config: dict

    @property
    def flops(self) -> float:
        """FLOP/s, of forward and backward passes."""
        return self.samples * flops_per_sample(_key(self.config))[1]


def estimate(cfg: DictConfig, measured: dict[tuple, Rate]) -> Estimate | None:
    """Cost of the run `cfg`; None for a data set of unknown size, for two networks, and on a CPU where
    nothing like it was measured."""
    if not _countable(cfg.data.name, cfg.model.kind):
        return None
    samples, evaluated, _ = SIZES[cfg.data.name]
    forward, both = flops_per_sample(_key(cfg))
    epochs = cfg.epochs
    if cfg.max_steps is not None:
        per_step = cfg.batch_size * (cfg.data.bptt if cfg.data.kind == "text" else 1)
        epochs = min(epochs, cfg.max_steps * per_step / samples)
    passes = cfg.optim.get("max_iter", 1)  # L-BFGS evaluates each batch at least so often
    rows = math.ceil(epochs / cfg.eval_every)
    flops = epochs * samples * passes * both + rows * evaluated * forward
    slower = EPOCHS_OF_EQUAL_TIME["adam"] / EPOCHS_OF_EQUAL_TIME.get(cfg.optim.name, EPOCHS_OF_EQUAL_TIME["adam"])
    on_cpu = cfg.num_gpus == 0
    if rate := measured.get(_what(on_cpu, OmegaConf.to_container(cfg, resolve=True))):
        seconds = flops / both / rate.samples
        return Estimate(flops, slower * seconds / 3600, f"measured on {rate.device}")
    if on_cpu:
        alike = [
            rate for rate in measured.values() if _on_cpu(rate.device) and rate.config["data"]["kind"] == cfg.data.kind
        ]
        if not alike:
            return None
        seconds = flops / statistics.median(rate.flops for rate in alike)
        devices = " or ".join(sorted({rate.device for rate in alike}))
        return Estimate(flops, slower * seconds / 3600, f"FLOP/s of other {cfg.data.kind} on {devices}")
    return Estimate(flops, slower * flops / paper_rate() / 3600, "the paper's GPU")


def measured_rates(root: Path) -> dict[tuple, Rate]:
    """The highest rate by what was run, from the rows below `root` of what `estimate` can count.

    Rows stay when a network goes or gets another key; those of one that is no more are passed over.
    """
    rates: dict[tuple, Rate] = {}
    for path in sorted(Path(root).rglob("*.jsonl.gz")):
        for row in read_all(path):
            try:
                config = row["config"] | {"model": groups.complete("model", row["config"]["model"])}
            except ConfigError:
                continue
            if not _countable(config["data"]["name"], config["model"]["kind"]):
                continue
            key = _what(_on_cpu(row["device"]), config)
            if row.get("throughput") and (key not in rates or row["throughput"] > rates[key].samples):
                rates[key] = Rate(row["throughput"], row["device"], config)
    return rates


def _countable(data: str, model: str | None) -> bool:
    """Whether the size of the data is known and a sample is one pass through one network."""
    return data in SIZES and model != "gan"


def _on_cpu(device: str) -> bool:
    return device.startswith("CPU")


def _what(on_cpu: bool, config: dict) -> tuple:
    """What decides how long a sample takes, of a configuration."""
    data = config["data"]
    size = data.get("resize") or data.get("size")
    return on_cpu, data["name"], size, json.dumps(config["model"]), config["precision"]


@functools.cache
def paper_rate() -> float:
    """FLOP/s that the paper's wall time implies."""
    from koala.runs import compose

    cfg = compose(["data=cifar100", "model=wrn50-2", "optim=sgd", "num_gpus=0"])
    forward, both = flops_per_sample(_key(cfg))
    samples, evaluated, _ = SIZES["cifar100"]
    return 100 * (samples * both + evaluated * forward) / PAPER_SECONDS


def _key(cfg: DictConfig | dict) -> str:
    given, model = cfg["data"], cfg["model"]
    data = {name: given.get(name) for name in ("name", "kind", "channels", "size", "bptt")}
    data["size"] = given.get("resize") or data["size"]
    model = OmegaConf.to_container(model, resolve=True) if isinstance(model, DictConfig) else model
    drawn = {"pretrained": None} if "pretrained" in model else {}  # no download to count with
    return json.dumps({"model": model | drawn, "data": data}, sort_keys=True)


@functools.cache
def flops_per_sample(key: str) -> tuple[float, float]:
    """FLOPs of a forward, and of a forward and backward pass, per image or token, for a model and data as JSON."""
    from koala import models

    spec = json.loads(key)
    model, data = spec["model"], spec["data"]
    classes = SIZES[data["name"]][2]
    text = data["kind"] == "text"
    shape = (data["bptt"],) if text else (data["channels"], data["size"], data["size"])
    with torch.device("meta"):
        net = models.build(model, kind=data["kind"], num_classes=classes, input_shape=shape)
        inputs = torch.zeros((2, *shape), dtype=torch.long if text else torch.float32)
    samples = inputs.numel() if text else len(inputs)
    with FlopCounterMode(display=False) as counter:
        outputs = net(inputs)
        forward = counter.get_total_flops()
        (outputs[0] if text else outputs).sum().backward()
    both = counter.get_total_flops()
    return forward / samples, both / samples
