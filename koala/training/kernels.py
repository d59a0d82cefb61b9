"""Kernels that a processor lacks, or that are wrong on some: what is there is tried, and what is done instead."""

import functools
import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


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
