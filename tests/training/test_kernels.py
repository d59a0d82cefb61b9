"""What a processor's kernels lack or do wrong is found by trying, and done another way that the record names."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from koala import records
from koala.training import machine
from koala.training.machine import Arithmetic
from tests.conftest import fork_ranks

CPU = torch.device("cpu")
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}  # makes any x86 processor compute as one without AVX-512
X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of x86 processors")


def compare_lstms(rank: int) -> None:
    """Under autocast with bf16, outputs, state and gradients are those of fp32 from inputs that came in bf16."""
    machine.keep_lstm_in_fp32("cpu")
    torch.manual_seed(0)
    lstm, inputs = nn.LSTM(6, 5, num_layers=2, batch_first=True), torch.randn(3, 7, 6, dtype=torch.bfloat16)
    state = tuple(torch.randn(2, 3, 5) for _ in range(2))
    expected, (hidden, cell) = lstm(inputs.float(), state)
    gradients = torch.autograd.grad(expected.square().sum(), list(lstm.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        output, left = lstm(inputs, tuple(part.bfloat16() for part in state))
        assert output.dtype == torch.float32
        output, left = lstm(inputs, state)
    torch.testing.assert_close([output, *left], [expected, hidden, cell], rtol=0, atol=0)
    result = torch.autograd.grad(output.square().sum(), list(lstm.parameters()))
    torch.testing.assert_close(result, gradients, rtol=0, atol=0)


def test_an_lstm_without_bf16_is_that_of_fp32():
    fork_ranks(compare_lstms, world=1)  # for good in a process, so in one of its own


@pytest.mark.extended
@pytest.mark.parametrize("model", ["tiny-lstm", "awd-lstm"])
def test_bf16_with_an_lstm_trains_on_every_processor(model, run_door, tmp_path):
    sizes = ["model.width=16", "batch_size=8", "max_steps=2"] + (["model.embedding=16"] if model == "awd-lstm" else [])
    given = ["data=pydocs", f"model={model}", "optim=koala-m", "precision=bf16", "logger=none", "num_gpus=0", *sizes]
    done = run_door("train.py", *given, env=AVX2)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("outputs/**/record.json")
    (segment,) = records.read_record(path.parent)["segments"]
    if platform.machine() in ("x86_64", "AMD64"):
        assert segment["arithmetic"] == "bf16, LSTM in fp32, contiguous"


def test_channels_last_only_where_its_kernels_are_safe(runs):
    for width, layout in ((4, "contiguous"), (8, "channels_last")):
        record = runs.launch("model=resnet18", f"model.width={width}", "max_steps=1")
        assert record["segments"][0]["arithmetic"] == f"fp32, {layout}"


@pytest.mark.parametrize(
    "layer, safe",
    [
        (nn.Conv2d(4, 8, 1, stride=2), False),
        (nn.Conv2d(8, 12, 1), False),
        (nn.Conv2d(16, 32, 1, groups=4), False),
        (nn.Conv2d(16, 32, 1, groups=2), True),
        (nn.Conv2d(3, 12, 3), True),
        (nn.Conv2d(8, 16, 1), True),
    ],
)
def test_narrow_pointwise_convolutions_are_kept_contiguous_on_cpus(layer, safe):
    for device, expected in ((CPU, safe), (torch.device("cuda"), True)):
        arithmetic = Arithmetic.of("fp32", device, nn.Sequential(layer), channels_last=True)
        assert arithmetic.memory_format == (torch.channels_last if expected else torch.contiguous_format)


@X86
@pytest.mark.extended
@pytest.mark.parametrize(
    "channels",
    [
        # Passes once oneDNN is mended: then machine.channels_last_is_safe can go.
        pytest.param(("4", "8"), marks=pytest.mark.xfail(strict=True, reason="torch 2.15.0 writes beyond its memory")),
        ("8", "16"),
    ],
)
def test_pointwise_convolutions_in_channels_last(channels):
    script = Path(__file__).with_name("channels_last.py")
    done = subprocess.run([sys.executable, script, *channels], env=os.environ | AVX2, capture_output=True, timeout=200)
    assert done.returncode == 0
