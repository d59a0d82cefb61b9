"""Builds and loads the filters' steps on a CPU (fused_cpu.h), and calls them with tables of addresses."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import Layout

log = logging.getLogger("koala")
name = "cpp"
SOURCE = Path(__file__).with_suffix(".h")
KERNELS = sorted(SOURCE.parent.glob("fused_cpu_*.h"))  # a filter's each, and what some of them share
VECTORS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
PLAIN = ["-fno-math-errno", "-fno-trapping-math"]  # or no loop with a root in it is vectorised; changes no number
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}  # at::ScalarType


def why_not(optimizer: Any, kernel: str, layout: Layout) -> str | None:
    """Why there are no C++ steps for these tensors, if so. Builds the library the first time."""
    if optimizer.hyper.get("use_muon"):
        return "use_muon is plain torch"
    for bucket in layout.buckets:
        if bucket.device.type != "cpu":
            return f"some weights are on {bucket.device}"
        if bucket.dtype not in DTYPES:
            return f"some weights are {bucket.dtype}"
        if strange := next((w for w in bucket.weights if type(w) not in (Tensor, torch.nn.Parameter)), None):
            return f"some weights are {type(strange).__name__}"
    reason = _library()
    if reason is None and not hasattr(torch.ops.koala, f"{kernel}_correct"):
        return f"there is no C++ kernel {kernel}"
    return reason


def predict(optimizer: Any, layout: Layout) -> None:
    """The filter's prediction: weights and buffers of the layout, in place."""
    frozen = optimizer.frozen_sum(layout)
    _operation(optimizer, "predict")(*_tables(layout), layout.shares, frozen, layout.filter)
    torch.autograd.graph.increment_version(layout.tensors)


def measure(optimizer: Any, layout: Layout) -> Tensor:
    """Rows of the dot products that the filter names, ``[1 + products, n]``, of this rank's tensors."""
    return _operation(optimizer, "measure")(*_tables(layout), _numbers(layout))


def correct(optimizer: Any, layout: Layout, sums: Tensor | None, rows: Tensor | None = None) -> None:
    """The update, in place; ``rows`` where they were summed over ranks, else they are measured here."""
    constants, numbers = layout.constants(optimizer), _numbers(layout)
    _operation(optimizer, "correct")(constants, *_tables(layout), numbers, layout.scalars, layout.filter, sums, rows)
    torch.autograd.graph.increment_version(layout.tensors)


def _operation(optimizer: Any, name: str) -> Any:
    return getattr(torch.ops.koala, f"{optimizer.kernel}_{name}")


def _tables(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses ``[lists, n]``, lengths and dtypes. They are the layout's, but for gradients: :func:`_numbers`."""
    if "cpp" not in layout.cache:
        rows = [bucket.addresses() for bucket in layout.buckets]
        addresses = [sum(lists, []) for lists in zip(*rows, strict=True)]
        lengths = [length for bucket in layout.buckets for length in bucket.lengths]
        dtypes = [DTYPES[bucket.dtype] for bucket in layout.buckets for _ in bucket.x]
        values = (addresses, lengths, dtypes)
        layout.cache["cpp"] = tuple(torch.tensor(value, dtype=torch.int64, device="cpu") for value in values)
    return layout.cache["cpp"]


def _numbers(layout: Layout) -> Tensor:
    """lr, decay, and whether there is a gradient, ``[3, n]``; the addresses of gradients go into the tables."""
    for bucket in layout.buckets:
        addresses = torch.tensor(bucket.gradient_addresses, device="cpu")
        _tables(layout)[0][1, bucket.columns] = addresses
    return torch.cat((layout.hyper[:, layout.group], layout.present[None]))


@functools.cache
def _library() -> str | None:
    """Load the library, built if need be; why it could not be, which is also logged as a warning."""
    library = _path()
    try:
        if not _is_intact(library):
            _build(library)
        try:
            torch.ops.load_library(str(library))
        except OSError:  # built for another machine
            _build(library)
            torch.ops.load_library(str(library))
    except (RuntimeError, OSError) as error:
        log.warning("no C++ steps here, and steps in plain torch are slower: %s", error)
        return str(error)
    return None


def _flags() -> list[str]:
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    return ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", *PLAIN, *vectors]


def _path() -> Path:
    """Where the shared library for these sources, this torch and this processor is, or is to be."""
    sources = [file.read_text() for file in (SOURCE, *KERNELS)]
    key = hashlib.sha256(repr((sources, _flags(), torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return root / f"koala-{key}.so"


def _is_intact(library: Path) -> bool:
    """Whether the file ends with the digest of what is before: to load one that was cut off would end the process."""
    if not library.is_file():
        return False
    content = library.read_bytes()
    intact = content[-32:] == hashlib.sha256(content[:-32]).digest()
    if not intact:
        log.warning("%s is damaged and is rebuilt", library)
    return intact


def _compiler() -> list[str]:
    """``$CXX`` (with its arguments), g++ or clang++."""
    for command in (os.environ.get("CXX"), "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise RuntimeError("there is no C++ compiler: install g++ or set CXX")


def _build(library: Path) -> None:
    installed = Path(torch.__file__).parent
    command = [*_compiler(), *_flags(), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [
        "-x",
        "c++",
        "-",
        f"-I{installed / 'include'}",
        f"-L{installed / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=library.parent)
    except OSError as error:
        raise RuntimeError(
            f"{library.parent} cannot be written ({error.strerror}): set TORCH_EXTENSIONS_DIR to a folder that can"
        ) from error
    with folder:  # renamed when complete: many ranks may build at once
        log.info("building %s into %s, which takes some seconds, once", SOURCE.name, library)
        built = Path(folder.name) / library.name
        source = "".join(f'#include "{file}"\n' for file in KERNELS)
        done = subprocess.run([*command, "-o", str(built)], input=source, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building {SOURCE.name} failed: {shlex.join(command)}\n{done.stderr[-2000:]}")
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(library)
