"""Image sets: train, validation and test sources of normalised batches.

Small sets live on the device as uint8 tensors and are augmented there, a batch at a time, without worker
processes; large ones are streamed (koala.data.streaming). Both give batches that depend on (seed, epoch,
step) alone.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from koala.data.augment import Augment
from koala.data.base import Batch, Data, Loading, shuffled
from koala.data.decode import decoded, resized
from koala.data.spec import ImageSpec
from koala.data.splits import carve


class TrainImages:
    """Shuffled, augmented batches of images that are on the device.

    Args:
        images, labels: uint8 [N, C, H, W] and int64 [N], on the device.
        augment: what turns chosen images into network inputs.
        drop_last: leave out the last incomplete batch.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Augment, loading: Loading, drop_last: bool = True):
        self.images, self.labels, self.augment, self.seed = images, labels, augment, loading.seed
        self._steps = loading.steps(len(images), drop_last)
        self.samples_per_step, self.steps_per_epoch = loading.batch_size, len(self._steps)

    def samples(self, index: int, epoch: int = 0) -> int:
        """Images of global step ``index``."""
        return self._steps.size(index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        count, device = len(self.images), self.images.device
        order = shuffled(count, self.seed, epoch).to(device)
        draws = self.augment.draw(count, self.images.shape[-1], self.seed, epoch).to(device)
        for step in range(start, self.steps_per_epoch):
            positions = self._steps.of_rank(step)
            chosen = order[positions]
            yield Batch(self.augment(self.images[chosen], draws[positions]), self.labels[chosen])


class EvalImages:
    """Every image once over all ranks, in order, not augmented."""

    def __init__(self, images: Tensor, labels: Tensor, augment: Augment, loading: Loading):
        self.images, self.labels, self.augment, self.count = images, labels, augment, len(images)
        self._parts = loading.eval_parts(self.count)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._parts:
            yield Batch(self.augment(self.images[rows]), self.labels[rows])


def build(spec: ImageSpec, loading: Loading) -> Data:
    """See koala.data.build. Images are cached below ``data_root``, except the digits and those of streamed
    sets."""
    if spec.streaming:
        from koala.data import streaming

        return streaming.build(spec, loading)
    device = loading.device
    stored, commit = decoded(spec, Path(loading.data_root))
    splits = {split: (resized(images, spec.shown), labels) for split, (images, labels) in stored.items()}
    images, labels = splits["train"]
    held_out = {}
    rest, chosen = carve(labels, spec, loading)
    if len(chosen):
        held_out["val"] = (images[chosen], labels[chosen])
        images, labels = images[rest], labels[rest]
    held_out["test"] = splits["test"]
    augment = Augment(
        spec.mean, spec.std, crop_padding=spec.crop_padding, flip=spec.flip, cutout=spec.cutout, device=device
    )
    return Data(
        train=TrainImages(images.to(device), labels.to(device), augment, loading, spec.drop_last),
        evaluation={
            split: EvalImages(x.to(device), y.to(device), augment, loading) for split, (x, y) in held_out.items()
        },
        kind="images",
        num_classes=spec.classes,
        input_shape=(spec.channels, spec.shown, spec.shown),
        commit=commit,
    )
