"""What is special about the C++ updates: groups of tensors, threads, the build."""

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import koala
from koala.optim import fused_cpu
from tests.refused import rejected

from .cases import NAMES, assert_same, make, snapshot


def large(name, fused):
    """Several groups of tensors, one of them a tensor that is larger than a group and no multiple of a chunk."""
    torch.manual_seed(0)
    sizes = (40_000, 700_001, 3, 600_000, 1_100_003, 0, 17)
    model = nn.Module()
    model.weights = nn.ParameterList(nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in sizes)
    optimizer = make(name, model, lr=0.1, weight_decay=0.01, fused=fused)
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


def test_where_there_are_no_fused_steps():
    """Insisting is refused by name; not insisting takes portable steps."""
    for fused in (True, None):
        p = nn.Parameter(torch.ones(2, device="meta"))
        p.grad = torch.ones(2, device="meta")
        optimizer = koala.VanillaKOALA([p], fused=fused)
        if fused:
            with rejected(RuntimeError, "fused=True", "meta", "fused=None"):
                optimizer.step(loss=1.0)
        else:
            optimizer.step(loss=1.0)
            assert optimizer.backend == "portable"


STEP = """
import logging, sys, torch, koala
logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
for _ in range(2):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = koala.VanillaKOALA([p], fused=eval(sys.argv[1]), sigma=1, q=0, r=1.0)
    optimizer.step(loss=3.0)
print(optimizer.backend, p.tolist())
"""


@pytest.fixture
def step(tmp_path):
    """Steps in a process of its own, because what is loaded once stays: with no library built yet."""

    def run(fused=None, **environment):
        environment = {"PATH": "/usr/bin:/bin", "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), **environment}
        return subprocess.run([sys.executable, "-c", STEP, str(fused)], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.extended
def test_says_why_it_cannot_be_built(step, tmp_path):
    """Without fused=True it falls back, and says so once."""

    def falls_back(name, **environment):
        done = step(**environment)
        assert done.stdout == "portable [0.0, 0.0]\n", done.stderr  # 1 - 1 / (1 * 2 + 1) * 3
        logged = [line for line in done.stderr.splitlines() if line.startswith("LOG")]
        assert any(name in line for line in logged) and len(logged) == len(set(logged)), done.stderr

    insisted = step(True, PATH="/nowhere")
    assert insisted.returncode and "CXX" in insisted.stderr
    falls_back("CXX", PATH="/nowhere")
    falls_back("fused_cpu.h", CXX="false")
    assert not list((tmp_path / "built").iterdir())
    (tmp_path / "file").touch()
    falls_back("TORCH_EXTENSIONS_DIR", TORCH_EXTENSIONS_DIR=f"{tmp_path}/file/cache")


def library(tmp_path):
    (built,) = (tmp_path / "built").glob("koala-*.so")
    return built


@pytest.mark.slow  # half a minute of g++; every fused step of the other tests needs the same build once a machine
def test_builds_anywhere_once(step, tmp_path):
    """And again where the file was cut off, which would end the process, or is no library at all."""
    done = step(CXX="g++ -DNDEBUG")
    assert done.stdout == "cpp [0.0, 0.0]\n", done.stderr
    assert sum(line.startswith("LOG") and "fused_cpu.h" in line for line in done.stderr.splitlines()) == 1
    assert step(PATH="/nowhere").stdout == "cpp [0.0, 0.0]\n"
    intact = library(tmp_path).read_bytes()
    for damaged in (intact[:1000], intact[:-1], b""):
        library(tmp_path).write_bytes(damaged)
        done = step(True)
        assert done.stdout == "cpp [0.0, 0.0]\n", done.stderr
        assert library(tmp_path).read_bytes() != damaged
        library(tmp_path).write_bytes(damaged)
        assert step(PATH="/nowhere").stdout == "portable [0.0, 0.0]\n"
    assert [file.name for file in (tmp_path / "built").iterdir()] == [library(tmp_path).name]


def test_a_library_of_another_machine_is_built_anew(monkeypatch, tmp_path):
    """It is intact, and cannot be loaded."""
    file = tmp_path / "koala-x.so"
    builds = []

    def build(path):
        builds.append(path)
        path.write_bytes(b"not for this machine" + hashlib.sha256(b"not for this machine").digest())

    monkeypatch.setattr(fused_cpu, "_path", lambda: file)
    monkeypatch.setattr(fused_cpu, "_build", build)
    assert fused_cpu._library.__wrapped__() is not None
    assert builds == [file, file]
    assert fused_cpu._library.__wrapped__() is not None
    assert builds == [file] * 3
