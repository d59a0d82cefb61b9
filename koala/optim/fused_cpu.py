"""Builds and loads fused_cpu.cpp, the filters' steps on a CPU, and calls it with tables of addresses."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends import say
from .layout import Layout

SOURCE = Path(__file__).with_name("fused_cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("fused_cpu_*.h"))
VECTORS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
PLAIN = ["-fno-math-errno", "-fno-trapping-math"]  # or no loop with a root in it is vectorised; changes no number
FILTERS = ("VanillaKOALA", "MomentumKOALA", "KOALAPlusPlus", "SOFIM", "SGDF")
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}  # at::ScalarType


class FusedCpu:
    """The C++ steps of fused_cpu.cpp, for float tensors on a CPU; built by the compiler at hand at the first use."""

    name = "cpp"

    def why_not(self, optimizer: Any, layout: Layout) -> str | None:
        """Why there are no C++ steps for these tensors, if so. Builds the library the first time."""
        if type(optimizer).__name__ not in FILTERS:
            return f"there are no C++ steps of {type(optimizer).__name__}"
        if optimizer.hyper.get("use_muon"):
            return "use_muon is plain torch"
        for bucket in layout.buckets:
            if bucket.device.type != "cpu":
                return f"some weights are on {bucket.device}"
            if bucket.dtype not in DTYPES:
                return f"some weights are {bucket.dtype}"
            if strange := next((w for w in bucket.weights if type(w) not in (Tensor, torch.nn.Parameter)), None):
                return f"some weights are {type(strange).__name__}"
        return _library()

    def measure(self, optimizer: Any, layout: Layout) -> Tensor:
        return torch.ops.koala.measure(type(optimizer).__name__, *_tables(layout), _numbers(layout))

    def correct(self, optimizer: Any, layout: Layout, sums: Tensor | None, rows: Tensor | None = None) -> None:
        name, constants = type(optimizer).__name__, optimizer.constants(layout)
        torch.ops.koala.correct(
            name, constants, *_tables(layout), _numbers(layout), layout.scalars, layout.filter, sums, rows
        )

    def predict(self, optimizer: Any, layout: Layout) -> None:
        hyper = optimizer.hyper
        drifts = torch.ops.koala.predict(*_tables(layout), hyper["go"])
        total = (drifts if layout.shares is None else drifts * layout.shares).sum() + layout.frozen
        hyper["drift"].copy_(torch.where(hyper["go"] > 0, total, hyper["drift"]))


def _tables(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses ``[lists, n]``, lengths and dtypes; but for gradients they are a layout's own."""
    if "cpp" not in layout.cache:
        rows = [bucket.addresses() for bucket in layout.buckets]
        addresses = [sum(lists, []) for lists in zip(*rows, strict=True)]
        lengths = [length for bucket in layout.buckets for length in bucket.lengths]
        dtypes = [DTYPES[bucket.dtype] for bucket in layout.buckets for _ in bucket.x]
        layout.cache["cpp"] = tuple(torch.tensor(values, dtype=torch.int64) for values in (addresses, lengths, dtypes))
    tables = layout.cache["cpp"]
    if layout.n:
        gradients = [address for bucket in layout.buckets for address in bucket.gradient_addresses]
        tables[0][1] = torch.tensor(gradients)
    return tables


def _numbers(layout: Layout) -> Tensor:
    """lr, decay, and whether there is a gradient, ``[3, n]``."""
    return torch.cat((layout.hyper[:, layout.group], layout.present[None]))


backend = FusedCpu()


@functools.cache
def _library() -> str | None:
    """Load the library, built if need be; why it could not be."""
    try:
        torch.ops.load_library(str(_build()))
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def _compiler() -> list[str]:
    """``$CXX`` (with its arguments), g++ or clang++."""
    for command in (os.environ.get("CXX"), "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise RuntimeError("there is no C++ compiler: install g++ or set CXX")


def _build() -> Path:
    """The shared library for these sources, this torch and this processor."""
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", *PLAIN]
    flags += VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    sources = [file.read_text() for file in (SOURCE, *HEADERS)]
    key = hashlib.sha256(repr((sources, flags, torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    library = root / f"koala-{key}.so"
    if library.exists():
        return library
    installed = Path(torch.__file__).parent
    command = [*_compiler(), *flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(SOURCE)]
    command += [f"-I{installed / 'include'}", f"-L{installed / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=root)
    except OSError as error:
        raise RuntimeError(
            f"{root} cannot be written ({error.strerror}): set TORCH_EXTENSIONS_DIR to a folder that can"
        ) from error
    with folder:  # renamed when whole: many ranks may build at once
        say(f"building {SOURCE.name} into {library}, which takes some seconds, once")
        built = Path(folder.name) / library.name
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building {SOURCE.name} failed: {shlex.join(command)}\n{done.stderr[-2000:]}")
        built.replace(library)
    return library
