"""What a GPU would say of a step and an evaluation, asked without one: no read by the host, nothing on two devices."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from koala import models
from koala.data.base import Batch, Data
from koala.errors import ConfigError
from koala.runs import compose
from koala.training import machine
from koala.training.evaluation import Evaluation
from koala.training.machine import Arithmetic
from koala.training.optimizers import build_optimizer
from koala.training.ranks import Ranks
from koala.training.step import Step
from koala.training.tally import Tally
from koala.training.tasks import build_task
from tests.refused import refused

CUDA = torch.device("cuda", 0)
WORDS = 50
SHAPES = {"images": (3, 32, 32), "text": (10,)}


class NoTransfers(TorchDispatchMode):
    """Counts operations that carry a tensor from the host to the device or back: each waits for the device's queue."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kinds = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        if len(kinds) > 1:
            self.seen.append(str(function))
        return result


def parts(overrides: list[str], kind: str, device: torch.device):
    """A step, an evaluation and a batch of the configured model and optimizer on `device`, without a run."""
    cfg = compose(["num_gpus=0", "logger=none", *overrides])
    ranks, task = Ranks(0, 1, device), build_task(cfg, WORDS)
    with device:
        module = models.build(cfg.model, kind=kind, num_classes=WORDS, input_shape=SHAPES[kind])
    arithmetic = Arithmetic(cfg.precision, device, torch.channels_last if kind == "images" else torch.contiguous_format)
    optimizer = build_optimizer(cfg.optim, cfg.wrapper, module)
    step = Step(cfg, ranks, arithmetic, task, module, module, optimizer)
    if kind == "images":
        batch = Batch(torch.randn(8, 3, 32, 32, device=device), torch.randint(WORDS, (8,), device=device))
    else:
        batch = Batch(*torch.randint(WORDS, (2, 8, 10), device=device).unbind())
    return step, Evaluation(cfg, ranks, arithmetic, None, module, task, lambda: None), batch


IMAGES = ["data=cifar100", "model=resnet18", "model.width=4", "model.layers=[1,1,1,1]"]
TEXT = ["data=ptb", "model=tiny-lstm", "model.width=16"]
CASES = {
    "images": ("images", IMAGES),
    "images, accumulated, clipped, bf16": ("images", [*IMAGES, "accumulation=3", "grad_clip=1", "precision=bf16"]),
    "text": ("text", TEXT),
    "text, bf16": ("text", [*TEXT, "precision=bf16"]),
    "transformer": ("text", ["data=ptb", "model=tiny-transformer", "model.width=16"]),
}


META = {name: case for name, case in CASES.items() if "bf16" not in name}  # the meta device has no autocast


@pytest.mark.parametrize("optim", ["koala-m", "sgd"])
@pytest.mark.parametrize("kind, overrides", META.values(), ids=META.keys())
def test_step_neither_reads_nor_sends_anything(kind, overrides, optim):
    """On the meta device, which has no values: to ask for one is an error. (Autograd needs a GPU for fake CUDA.)"""
    meta = torch.device("meta")
    step, _, batch = parts([*overrides, f"optim={optim}"], kind, meta)
    tally = Tally.zero(step.task.counts, meta)
    tally += step(batch, len(batch.targets), 0)  # makes the optimizer's state
    with NoTransfers() as transfers:
        tally += step(batch, len(batch.targets), 1)
    assert not transfers.seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_sends_nothing_and_reads_one_sum(precision):
    """With fake CUDA tensors: nothing goes from host to device or back before the sum of all batches is asked for."""
    with FakeTensorMode():
        _, evaluation, batch = parts([*IMAGES, f"precision={precision}"], "images", CUDA)
        evaluation.data = Data(None, {}, "images", WORDS, SHAPES["images"])
        read = []
        count = lambda sums: read.append(sums.device) or torch.ones(len(sums))  # noqa: E731
        evaluation.ranks = SimpleNamespace(sum=count, device=CUDA)
        with NoTransfers() as transfers:
            with contextlib.suppress(DataDependentOutputException):
                evaluation.evaluate(evaluation.module, [batch] * 3)
        assert read == [CUDA] and not transfers.seen


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["koala-m", "koala++", "sgd", "adam"])
@pytest.mark.parametrize("kind, overrides", CASES.values(), ids=CASES.keys())
def test_step_on_a_gpu_waits_for_nothing(kind, overrides, optim):
    """The same on the device, where torch itself raises at every wait."""
    step, _, batch = parts([*overrides, f"optim={optim}"], kind, CUDA)
    step(batch, len(batch.targets), 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            step(batch, len(batch.targets), number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Greedy(torch.nn.Module):
    """A model that has no room for more than two images, and tells what was alive when it was asked again."""

    def __init__(self, batch_norm: bool):
        super().__init__()
        self.weight, self.held, self.alive = torch.nn.Parameter(torch.ones(WORDS)), None, []
        self.norm = torch.nn.BatchNorm1d(WORDS) if batch_norm else None

    def forward(self, inputs):
        self.alive.append(self.held is not None and self.held() is not None)
        activation = inputs.flatten(1)[:, :1] * self.weight
        self.held = weakref.ref(activation)
        if len(inputs) > 2:
            raise RuntimeError("can't allocate memory: a simulated shortage")
        return activation


@pytest.mark.parametrize("batch_norm", [False, True])
def test_search_for_what_fits_begins_when_the_failed_step_is_freed(batch_norm):
    step, _, batch = parts([*IMAGES, "optim=sgd"], "images", torch.device("cpu"))
    step.module = step.net = Greedy(batch_norm)
    step.optimizer = torch.optim.SGD(step.module.parameters(), lr=0.1)
    with pytest.raises(ConfigError) as caught:
        step(batch, 8, 0)
    assert caught.value.key == "batch_size" and caught.value.valid.startswith("accumulation=4, ")
    assert ("BatchNorm" in caught.value.valid) == batch_norm
    assert len(step.module.alive) >= 3 and not any(step.module.alive[1:3])


def test_tf32_is_said_aloud():
    cpu = torch.device("cpu")
    with refused("precision", "tf32", ("bf16", "fp32", "fp64")):
        machine.prepare(cpu, "tf32", False)
    machine.prepare(cpu, "fp32", False)
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
