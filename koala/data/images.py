"""Image sets: train, validation and test sources of normalised batches.

Small sets live on the device as uint8 tensors and are augmented there, a batch at a time, without worker
processes; large ones are streamed (koala.data.streaming). Both give batches that depend on (seed, epoch,
step) alone.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from koala.data.augment import Augment
from koala.data.base import Batch, Data, Steps, eval_parts, shuffled
from koala.data.decode import decoded, resized
from koala.data.spec import ImageSpec
from koala.data.splits import carve


class TrainImages:
    """Shuffled, augmented batches of images that are on the device.

    Args:
        images, labels: uint8 [N, C, H, W] and int64 [N], on the device.
        augment: what turns chosen images into network inputs.
        batch_size: global; this rank yields its ``rank``-th of ``world`` parts of every batch.
        drop_last: leave out the last incomplete batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augment: Augment,
        *,
        seed: int,
        batch_size: int,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.labels, self.augment, self.seed = images, labels, augment, seed
        self._steps = Steps(len(images), batch_size, drop_last, rank, world)
        self.samples_per_step, self.steps_per_epoch = batch_size, len(self._steps)

    def samples(self, index: int, epoch: int = 0) -> int:
        """Images of global step ``index``."""
        return self._steps.size(index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        count, device = len(self.images), self.images.device
        order = shuffled(count, self.seed, epoch).to(device)
        draws = self.augment.draw(count, self.images.shape[-1], self.seed, epoch).to(device)
        for step in range(start, self.steps_per_epoch):
            mine = self._steps.own(step)
            chosen = order[mine]
            yield Batch(self.augment(self.images[chosen], draws[mine]), self.labels[chosen])


class EvalImages:
    """Every image once over all ranks, in order, not augmented. ``batch_size`` is each rank's, at most."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augment: Augment,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.count = len(images)
        self._parts = eval_parts(self.count, batch_size, rank, world)

    def __iter__(self) -> Iterator[Batch]:
        for mine in self._parts:
            yield Batch(self.augment(self.images[mine]), self.labels[mine])


def build(
    spec: ImageSpec,
    *,
    seed: int,
    batch_size: int,
    eval_batch_size: int,
    rank: int,
    world: int,
    device: torch.device,
    data_root: Path,
) -> Data:
    """See koala.data.build. Images are cached below ``data_root``, except the digits and those of streamed
    sets."""
    if spec.streaming:
        from koala.data import streaming

        return streaming.build(
            spec,
            seed=seed,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            rank=rank,
            world=world,
            device=device,
            data_root=data_root,
        )
    splits = {
        split: (resized(images, spec.shown), labels) for split, (images, labels) in decoded(spec, data_root).items()
    }
    images, labels = splits["train"]
    held_out = {}
    rest, chosen = carve(labels, spec, batch_size, world)
    if len(chosen):
        held_out["val"] = (images[chosen], labels[chosen])
        images, labels = images[rest], labels[rest]
    held_out["test"] = splits["test"]
    augment = Augment(
        spec.mean, spec.std, crop_padding=spec.crop_padding, flip=spec.flip, cutout=spec.cutout, device=device
    )
    return Data(
        train=TrainImages(
            images.to(device),
            labels.to(device),
            augment,
            seed=seed,
            batch_size=batch_size,
            drop_last=spec.drop_last,
            rank=rank,
            world=world,
        ),
        evaluation={
            split: EvalImages(x.to(device), y.to(device), augment, batch_size=eval_batch_size, rank=rank, world=world)
            for split, (x, y) in held_out.items()
        },
        kind="images",
        num_classes=spec.classes,
        input_shape=(spec.channels, spec.shown, spec.shown),
    )
