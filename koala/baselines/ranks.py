"""Statistics of one batch whose parts lie on several ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def average(tensors: list[Tensor], weight: float = 1.0) -> None:
    """Replaces each tensor, in place, by its mean over the ranks of the default group, each rank with its `weight`.

    One reduction for all of them. Does nothing without a group, or with one rank in it.
    """
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() * weight for tensor in tensors] + [tensors[0].new_tensor([weight])])
    dist.all_reduce(flat)
    *parts, total = flat.split([tensor.numel() for tensor in tensors] + [1])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor) / total)
