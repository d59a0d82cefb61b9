"""The Jacobian of a network's outputs with respect to its weights, and which outputs have one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def jacobian(outputs: Tensor, params: Sequence[Tensor], chunk_size: int) -> list[Tensor | None]:
    """Rows d outputs[m] / d params[i]: [M, numel] for each parameter, None where no output depends on it.

    Rows are vector-Jacobian products, ``chunk_size`` of them in one vectorised backward pass, whose memory is that of
    so many passes. An operation that cannot be vectorised is differentiated row by row. The graph stays.

    Args:
        outputs: M of them, of any shape, with their graph.
    """
    with torch.enable_grad():
        outputs = outputs.reshape(-1)
    rows: list[Tensor | None] = [None] * len(params)
    size = len(outputs)
    for start in range(0, size, chunk_size):
        stop = min(start + chunk_size, size)
        basis = outputs.new_zeros(stop - start, size)
        basis[:, start:stop].fill_diagonal_(1)
        for i, part in enumerate(_products(outputs, params, basis)):
            if part is not None:
                if rows[i] is None:
                    rows[i] = params[i].new_zeros(size, params[i].numel())
                rows[i][start:stop] = part.to_dense().reshape(stop - start, -1)
    return rows


def _products(outputs: Tensor, params: Sequence[Tensor], vectors: Tensor) -> Sequence[Tensor | None]:
    """``vectors`` [K, M] times the Jacobian: [K, ...] for each parameter."""
    try:
        return torch.autograd.grad(
            outputs, params, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError as error:  # of an operation without a vectorised backward, or of memory
        log.debug("the backward pass is made row by row: %s", error)
    each = [torch.autograd.grad(outputs, params, vector, retain_graph=True, allow_unused=True) for vector in vectors]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]


def depends_on_the_batch(outputs: Tensor) -> bool:
    """Whether a BatchNorm in training mode, which mixes the samples of a batch, is in the graph of ``outputs``."""
    seen, todo = set(), [outputs.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
            samples = getattr(node, "_saved_input", None)
            if samples is None or len(samples) > 1:  # InstanceNorm comes as a batch of one sample, which mixes nothing
                return True
        todo += [following for following, _ in node.next_functions]
    return False
