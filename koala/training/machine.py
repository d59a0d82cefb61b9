"""The machine under a run: arithmetic, kernels that it lacks, memory, and what fits where there was too little."""

import contextlib
import ctypes
import functools
import gc
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from koala.data.base import Batch
from koala.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arithmetic:
    """In which numbers and which layout a model is trained and evaluated.

    Args:
        precision: fp32 (IEEE also on GPUs) | tf32 (GPUs: 10 bits of mantissa in products) | bf16 (autocast) | fp64.
        memory_format: of images and of a model's weights.
        lstm_in_fp32: under autocast, where the device has no LSTM in bf16.
    """

    precision: str
    device: torch.device
    memory_format: torch.memory_format
    lstm_in_fp32: bool = False

    @classmethod
    def of(cls, precision: str, device: torch.device, module: nn.Module, *, channels_last: bool) -> "Arithmetic":
        """That of a model; channels_last only where the device's kernels are safe in it."""
        last = channels_last and channels_last_is_safe(module, device.type)
        has_lstm = any(isinstance(part, nn.LSTM) for part in module.modules())
        lstm_in_fp32 = precision == "bf16" and has_lstm and not lstm_has_bf16(device.type)
        if lstm_in_fp32:
            keep_lstm_in_fp32(device.type)
        return cls(precision, device, torch.channels_last if last else torch.contiguous_format, lstm_in_fp32)

    def __str__(self) -> str:
        """For the record: "bf16, LSTM in fp32, contiguous"."""
        layout = "channels_last" if self.memory_format == torch.channels_last else "contiguous"
        return ", ".join([self.precision, *(["LSTM in fp32"] if self.lstm_in_fp32 else []), layout])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images; autocast computes in bf16 from float32."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def cast(self, batch: Batch) -> Batch:
        """Images in the model's dtype and memory layout; tokens as they are."""
        if not batch.inputs.is_floating_point():
            return batch
        return batch._replace(inputs=batch.inputs.to(dtype=self.dtype, memory_format=self.memory_format))

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


@functools.cache
def lstm_has_bf16(device_type: str) -> bool:
    """Whether an LSTM can be run in bf16, forward and backward; oneDNN's needs AVX-512."""
    zeros = functools.partial(torch.zeros, device=device_type, requires_grad=True)
    state, weights = (zeros(1, 1, 1), zeros(1, 1, 1)), [zeros(4, 1), zeros(4, 1), zeros(4), zeros(4)]
    try:
        with torch.enable_grad(), torch.autocast(device_type, torch.bfloat16):
            output, *_ = torch.lstm(zeros(1, 1, 1), state, weights, True, 1, 0.0, True, False, True)
            output.sum().backward()
    except RuntimeError:
        return False
    return True


@functools.cache
def keep_lstm_in_fp32(device_type: str) -> torch.library.Library:
    """Has autocast run every LSTM of this process in fp32, as it does with other operations that have no bf16."""
    log.warning("precision=bf16: the %s has no bf16 kernel for an LSTM, which is run in fp32", device_type)
    library = torch.library.Library("aten", "IMPL")  # acts as long as it lives: in the cache
    library.impl("lstm.input", _lstm_in_fp32, f"Autocast{device_type.upper()}", allow_override=True)
    return library


def _lstm_in_fp32(inputs: Tensor, state: list[Tensor], weights: list[Tensor], *options) -> tuple[Tensor, ...]:
    with torch.autocast(inputs.device.type, enabled=False):
        return torch.lstm(inputs.float(), [x.float() for x in state], [x.float() for x in weights], *options)


def channels_last_is_safe(module: nn.Module, device_type: str) -> bool:
    """Whether the model's convolutions can be trained in this layout.

    With AVX2, oneDNN's gradient of the weights of a 1x1 convolution writes beyond its memory unless the channels of
    each group fill vectors of 8 (tests/training/channels_last.py shows it with torch alone).
    """
    narrow = (
        part.kernel_size == (1, 1) and (part.in_channels // part.groups % 8 or part.out_channels // part.groups % 8)
        for part in module.modules()
        if isinstance(part, nn.Conv2d)
    )
    return device_type != "cpu" or not any(narrow)


def prepare(device: torch.device, precision: str, deterministic: bool) -> None:
    """Sets what torch keeps for a whole process: exactness of products, choice of algorithms, the allocator.

    Raises:
        ConfigError: the device does not have the precision.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError("precision", "tf32", "only GPUs have it", valid=("fp32", "bf16", "fp64"))
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # torch's own default is True: convolutions in TF32
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        torch.cuda.reset_peak_memory_stats()
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Stops glibc from returning freed activations to the kernel, which would fault them in again at every step.

    Measured on tiny-LSTM (20 x 35 tokens, 10,000 words, 2 threads): 84 -> 66 ms a step in fp32, 45 -> 32 ms in bf16.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc; musl has none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def is_exhausted(error: RuntimeError) -> bool:
    """Whether an error means that there was no memory left (the CPU's allocator has no type of its own for it)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Gives back what nobody holds any more. Not inside `except`: the error's frames hold the failed step's tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_fitting(attempt: Callable[[int], None], size: int) -> int | None:
    """The largest of `size`/2, `size`/4, ... samples for which `attempt(samples)` does not run out of memory."""
    while size > 1:
        size //= 2
        free_memory()
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
        else:
            return size
    return None


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """The GPU's product name, or the CPU's and its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else 'unknown'}, {torch.get_num_threads()} threads"
