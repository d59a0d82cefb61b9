"""What is special about the C++ updates: groups of tensors, threads, the build."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import koala

from .cases import NAMES, assert_same, make, snapshot


def large(name, way):
    """Several groups of tensors, one of them a tensor that is larger than a group and no multiple of a chunk."""
    torch.manual_seed(0)
    sizes = (40_000, 700_001, 3, 600_000, 1_100_003, 0, 17)
    model = nn.Module()
    model.weights = nn.ParameterList(nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in sizes)
    optimizer = make(name, model, lr=0.1, weight_decay=0.01, fused=way)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p) / 1000
        optimizer.step(loss=2.0, loss_var=5.0)
    return snapshot(model, optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_groups_and_chunks_change_nothing(name):
    assert_same(large(name, True), large(name, False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_does_not_change_a_bit(name):
    one = large(name, True)
    torch.set_num_threads(3)
    assert_same(large(name, True), one, rtol=0, atol=0)


def test_weights_elsewhere_are_refused():
    optimizer = koala.VanillaKOALA([nn.Parameter(torch.ones(2, device="meta"))], fused=True)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="fused=True is for the CPU and weights are on meta: use fused=None"):
        optimizer.step(loss=1.0)


def test_builds_anywhere_and_says_why_not(tmp_path):
    """In processes of their own: what is loaded once stays."""
    script = """
import torch, koala
p = torch.nn.Parameter(torch.ones(2))
p.grad = torch.ones(2)
koala.VanillaKOALA([p], fused=True, sigma=1, q=0, r=1.0).step(loss=3.0)
print(p.tolist())
"""

    def step(**environment):
        environment = {"PATH": "/usr/bin:/bin", "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), **environment}
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    assert "needs a C++ compiler on the CPU: install g++" in step(PATH="/nowhere").stderr
    failed = step(CXX="false")
    assert "building fused.cpp failed" in failed.stderr and not list((tmp_path / "built").iterdir())
    assert step().stdout == "[0.0, 0.0]\n"  # 1 - 1 / (1 * 2 + 1) * 3
    assert step(PATH="/nowhere").stdout == "[0.0, 0.0]\n"  # built once
