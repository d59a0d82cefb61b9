"""Which of a set's samples are held out: a choice that depends on the labels alone, so it is everybody's."""

import torch
from torch import Tensor

from koala.data.base import Loading, generator
from koala.data.spec import LabelledSpec
from koala.errors import ConfigError


def stratified(labels: Tensor, count: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Splits positions 0..N-1 in (the rest, ``count`` chosen ones), both ascending. Every class is
    represented in proportion, to within one sample; the choice depends on ``purpose`` and the labels
    alone."""
    order = torch.randperm(len(labels), generator=generator(purpose))
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    rank_in_class = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    chosen = by_class[((rank_in_class + 0.5) / sizes[labels[by_class]]).argsort(stable=True)[:count]]
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[chosen] = False
    return keep.nonzero().squeeze(1), chosen.sort().values


def carve(labels: Tensor, spec: LabelledSpec, loading: Loading) -> tuple[Tensor, Tensor]:
    """Splits the training split in (what is trained on, ``spec.validation`` held out ones), as ``stratified``
    does.

    Raises:
        ConfigError: what is left has no batch of ``batch_size``, or a last one that is kept but too small for the
            pieces of the ranks.
    """
    left, batch_size = len(labels) - spec.validation, loading.batch_size
    if left < 1:
        reason = f"there are {len(labels)} samples to train on"
        raise ConfigError("data.validation", spec.validation, reason, valid=f"0 to {len(labels) - 1}")
    if not 1 <= batch_size <= left:
        reason = f"data={spec.name} has {left} samples to train on"
        raise ConfigError("batch_size", batch_size, reason, valid=f"1 to {left}")
    last, pieces = left % batch_size, loading.world * loading.accumulation
    if not spec.drop_last and 0 < last < pieces and loading.world > 1:  # ranks without a piece leave others waiting
        reason = f"the last batch has {last} samples for ranks x accumulation = {pieces}"
        raise ConfigError(
            "data.drop_last", False, reason, valid=f"data.drop_last=true, or another batch_size than {batch_size}"
        )
    return stratified(labels, spec.validation, "validation")
