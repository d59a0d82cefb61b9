"""Builds and loads fused.cpp, the filters' updates on the CPU."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("fused.cpp")
VECTORS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}


def compiler() -> str:
    """The C++ compiler: ``$CXX``, g++ or clang++.

    Raises:
        RuntimeError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("fused=True needs a C++ compiler on the CPU: install g++ or set CXX")


def kernels(device: torch.device):
    """``torch.ops.koala``, built at the first use (some seconds) and kept in the folder of torch's extensions.

    Raises:
        RuntimeError: the weights are not on the CPU, there is no compiler, or it failed.
    """
    if device.type != "cpu":
        raise RuntimeError(f"fused=True is for the CPU and weights are on {device}: use fused=None")
    _load()
    return torch.ops.koala


def packed(*values: Tensor | float) -> Tensor:
    """0-dim tensors and numbers as one float64 tensor."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64).reshape(()) for value in values])


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(_build()))


def _build() -> Path:
    """The shared library for this source, this torch and this processor."""
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp"]
    flags += VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    key = hashlib.sha256(repr((SOURCE.read_text(), flags, torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    library = root / f"koala-{key}.so"
    if library.exists():
        return library
    root.mkdir(parents=True, exist_ok=True)
    command = [compiler(), *flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(SOURCE)]
    installed = Path(torch.__file__).parent
    command += [f"-I{installed / 'include'}", f"-L{installed / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=root) as folder:  # renamed when whole: many ranks may build at once
        built = Path(folder) / library.name
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building {SOURCE.name} failed: {' '.join(command)}\n{done.stderr[-2000:]}")
        built.replace(library)
    return library
