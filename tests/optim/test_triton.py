"""What can be said of the Triton kernels without a GPU: they take the reference's steps in Triton's interpreter, which
has a process of its own (interpreted.py), and compile for GPUs that are not here, to wide loads and without spills."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import CLASSES, NAMES, make

triton = pytest.importorskip("triton", reason="torch has Triton on Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from koala.optim import fused_cuda  # noqa: E402

pytestmark = pytest.mark.extended


@pytest.mark.timeout(600)
def test_the_kernels_take_the_steps_of_the_reference_in_the_interpreter():
    """Triton reads the variable when it is imported, for good: hence the process."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


TYPES = {torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


def launched(name, dtype, monkeypatch):
    """Kernel, arguments and options of every launch of a step."""
    launches = []
    modules = fused_cuda.passes, fused_cuda.kernels_of(CLASSES[name].kernel)

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.kernel, args, options))

    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # Triton serves tensors of the CPU, but its kernels are none of them
        patch.setattr(fused_cuda, "_why_not", lambda device: None)
        for module in modules:
            for kernel in {"predict", "measure", "gains", "apply"} & vars(module).keys():
                patch.setattr(module, kernel, Recorder(getattr(module, kernel)))
        model = torch.nn.Linear(64, 64).to(dtype)
        optimizer = make(name, model, fused=True, weight_decay=0.01)
        model(torch.ones(2, 64, dtype=dtype)).sum().backward()
        optimizer.update(1.0)
    return launches


def compiled(launch, architecture):
    kernel, args, options = launch
    options = dict(options)
    settings = {key: options.pop(key) for key in ("num_warps", "enable_fp_fusion") if key in options}
    signature = {
        name: TYPES[arg.dtype] if isinstance(arg, torch.Tensor) else "i32"
        for name, arg in zip(kernel.arg_names, args, strict=False)
    }
    signature |= dict.fromkeys(options, "constexpr")
    source = ASTSource(kernel, signature, constexprs=options)
    target = (
        GPUTarget("hip", architecture, 64) if isinstance(architecture, str) else GPUTarget("cuda", architecture, 32)
    )
    return triton.compile(source, target=target, options=settings)


def resources(cubin, tmp_path):
    """Registers of a thread, and the bytes of its stack, which is where spilled registers go."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))


CASES = [
    *((name, torch.float32, 90) for name in NAMES),
    *((name, torch.bfloat16, 90) for name in ("koala-m", "koala++")),
    *(("koala++", torch.float32, architecture) for architecture in (80, 100)),
]


def test_compiles_for_rocm(monkeypatch):
    for launch in launched("koala-m", torch.float32, monkeypatch):
        assembly = compiled(launch, "gfx942").asm["amdgcn"]
        assert re.search(r"vgpr_spill_count: 0\b", assembly), launch[0].__name__


@pytest.mark.parametrize(("name", "dtype", "architecture"), CASES)
def test_compiles_for_cuda(name, dtype, architecture, monkeypatch, tmp_path):
    launches = launched(name, dtype, monkeypatch)
    assert len(launches) == (4 if name == "koala-m" else 3)
    for launch in launches:
        kernel = launch[0].__name__
        built = compiled(launch, architecture)
        registers, stack = resources(built.asm["cubin"], tmp_path)
        if kernel != "gains":  # which are one program and may be slow
            assert stack == 0 and registers <= 128, kernel
            assert re.search(r"ld\.global\.v4\.b32", built.asm["ptx"]), kernel
            assert kernel == "measure" or re.search(r"st\.global\.v4\.b32", built.asm["ptx"]), kernel
        assert registers <= 168, kernel
