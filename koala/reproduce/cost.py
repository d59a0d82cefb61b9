"""What a run costs before it is started, in FLOPs.

They are those of one forward and backward pass, counted by torch on the model without data (meta device), times the
samples of the run, plus the forward passes of the evaluations, of which every run has one at its end. An optimizer's
own work is not counted.
"""

import functools
import json
import math
from collections.abc import Iterable

import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from koala import models
from koala.data.spec import spec_of

# Samples (images; tokens of text) of each split that is trained on and evaluated every epoch, and classes or words.
SIZES = {
    "mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet32": (1_281_167, 50_000, 1000),
    "imagenet": (1_281_167, 50_000, 1000),
    "imagenet100": (126_689, 5_000, 100),
    "oxford-pets": (3_680, 3_669, 37),
    "oxford-flowers": (2_040, 6_149, 102),
    "food101": (75_750, 25_250, 101),
    "digits": (1_257, 540, 10),
    "ptb": (929_589, 156_190, 10_000),
    "wikitext2": (2_088_628, 463_000, 33_278),
    "wikitext2-gpt1": (2_357_000, 530_000, 40_479),
    "pydocs": (95_000, 10_000, 5_000),
}


def run_flops(cfg: DictConfig) -> float | None:
    """FLOPs of the run `cfg`; None for data of unknown size and for a GAN, which has two networks."""
    if cfg.data.name not in SIZES or cfg.model.kind == "gan":
        return None
    samples, evaluated, _ = SIZES[cfg.data.name]
    forward, both = flops_per_sample(_key(cfg))
    epochs = cfg.epochs
    if cfg.max_steps is not None:
        per_step = cfg.batch_size * (cfg.data.bptt if cfg.data.kind == "text" else 1)
        epochs = min(epochs, cfg.max_steps * per_step / samples)
    passes = cfg.optim.get("max_iter", 1)  # L-BFGS evaluates each batch at least so often
    evaluations = math.ceil(epochs / cfg.eval_every)
    return epochs * samples * passes * both + evaluations * evaluated * forward


def total(costs: Iterable[float | None]) -> str:
    """The sum for a reader: "8 runs, 1.2e+15 FLOP (2 of unknown size)"."""
    costs = list(costs)
    counted = [cost for cost in costs if cost is not None]
    unknown = f" ({len(costs) - len(counted)} of unknown size)" if len(counted) < len(costs) else ""
    return f"{len(costs)} runs, {sum(counted):.2e} FLOP{unknown}"


def _key(cfg: DictConfig) -> str:
    """The model and the shape of its input as JSON: equal for runs whose samples cost the same."""
    classes = min(SIZES[cfg.data.name][2], cfg.data.get("vocabulary") or math.inf)
    data = {"kind": cfg.data.kind, "classes": classes, "shape": spec_of(cfg.data).input_shape}
    return json.dumps({"model": models.untrained(cfg.model), "data": data}, sort_keys=True)


@functools.cache
def flops_per_sample(key: str) -> tuple[float, float]:
    """FLOPs of a forward, and of a forward and backward pass, per image or token."""
    config = json.loads(key)
    data = config["data"]
    text, shape = data["kind"] == "text", tuple(data["shape"])
    with torch.device("meta"):
        net = models.build(config["model"], kind=data["kind"], num_classes=data["classes"], input_shape=shape)
        inputs = torch.zeros((2, *shape), dtype=torch.long if text else torch.float32)
    samples = inputs.numel() if text else len(inputs)
    with FlopCounterMode(display=False) as counter:
        outputs = net(inputs)
        forward = counter.get_total_flops()
        (outputs[0] if text else outputs).sum().backward()
    return forward / samples, counter.get_total_flops() / samples
