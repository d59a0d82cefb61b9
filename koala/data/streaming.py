"""Image sets too large for the device: decoded, cropped and resized by worker processes while the network
trains.

Workers give uint8 images of the right size; flip, cutout and normalisation happen on the device, a batch at a
time. A sample's crop depends on (seed, epoch, position in the epoch's order) alone, so that neither the
number of workers nor of ranks changes it, and a resumed epoch starts without decoding what it skips.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms.v2 import functional as transforms

from koala.data.augment import Augment
from koala.data.base import Batch, Data, Loading, generator, shuffled
from koala.data.decode import pixels
from koala.data.encoded import Encoded, encoded
from koala.data.spec import ImageSpec
from koala.data.splits import carve
from koala.data.tables import commit_of
from koala.errors import ConfigError

Key = tuple[str, int, int, int]  # split, row; in training epoch and position in its order, else -1 and -1
Keys = Iterable[list[Key]]  # by batch


class Decoded(Dataset):
    """Decoded images of all splits, uint8 [C, size, size] with their labels.

    Training: a random crop of 8 % to 100 % of the image, resized. Evaluation: the central crop of an image whose
    shorter side has been resized to 256/224 of ``size``. Both as is usual for ImageNet.
    """

    def __init__(self, splits: dict[str, Encoded], spec: ImageSpec, seed: int) -> None:
        self.splits, self.spec, self.seed = splits, spec, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | ConfigError:
        split, row, epoch, position = key
        try:
            image = pixels(self.splits[split], row, self.spec.channels)
        except ConfigError as error:
            return error  # raised in a worker it would arrive inside that worker's traceback
        label, size = int(self.splits[split].labels[row]), self.spec.size
        if position < 0:
            image = transforms.resize(image, [round(size * 256 / 224)], antialias=True)
            return transforms.center_crop(image, [size, size]), label
        crop = random_box(*image.shape[1:], generator(self.seed, epoch, "resized crop", position))
        return transforms.resized_crop(image, *crop, [size, size], antialias=True), label

    def collate(self, samples: list[tuple[Tensor, int] | ConfigError]) -> tuple[Tensor, Tensor] | ConfigError:
        """Stacks samples, also none of them: a rank's part of a very small evaluation may be empty.

        In a worker it puts them into shared memory. The queue would do so as well, but in a thread whose errors are
        printed and no more: the parent would wait for ever.
        """
        for sample in samples:
            if isinstance(sample, ConfigError):
                return sample
        shape = (len(samples), self.spec.channels, self.spec.size, self.spec.size)
        images = torch.empty(shape, dtype=torch.uint8)
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        if worker := get_worker_info():
            try:
                images.share_memory_(), labels.share_memory_()
            except RuntimeError as error:  # torch's word for a full /dev/shm
                reason = f"there is no room for their batches: {error}"
                valid = "a larger /dev/shm (docker run --shm-size=8g), fewer workers or smaller batches"
                return ConfigError("data.workers", worker.num_workers, reason, valid=valid)
        for slot, (image, _) in zip(images, samples, strict=True):
            slot.copy_(image)
        return images, labels


def random_box(height: int, width: int, source: torch.Generator) -> tuple[int, int, int, int]:
    """Draws top, left, height and width of a crop: 8 % to 100 % of the area, sides in ratio 3/4 to 4/3 (log-uniform).

    The distribution of torchvision's RandomResizedCrop (Szegedy et al., arXiv 1409.4842): ten tries, then the largest
    central crop whose ratio is allowed. That class draws from the global generator, which costs four times as much to
    put aside and back again.
    """
    for area, ratio, top, left in torch.rand(10, 4, generator=source).tolist():
        target, aspect = height * width * (0.08 + 0.92 * area), (4 / 3) ** (2 * ratio - 1)
        high, wide = round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))
        if 0 < high <= height and 0 < wide <= width:
            return int(top * (height - high + 1)), int(left * (width - wide + 1)), high, wide
    high, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - high) // 2, (width - wide) // 2, high, wide


class Pool:
    """The worker processes of a rank: they are started once, and decode for every epoch and split in turn.

    One iteration at a time: a later one takes the workers away from an earlier one, which then says so.
    """

    def __init__(self, decoded: Decoded, workers: int, device: torch.device) -> None:
        self._device, self._keys = device, _Keys()
        self._loader = DataLoader(
            decoded,
            batch_sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=decoded.collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or else it draws from the global one, and resuming is not exact
        )

    def batches(self, keys: Keys) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, labels) on the device for each list of keys, decoded ahead by the workers.

        Raises:
            ConfigError: there is a row that cannot be decoded.
        """
        self._keys.now = keys
        for batch in self._loader:
            if self._keys.now is not keys:
                break
            if isinstance(batch, ConfigError):
                raise batch
            images, labels = batch
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        if self._keys.now is not keys:
            raise RuntimeError("these workers decode for another iteration by now")


class _Keys:
    """What a data loader with lasting workers asks for at each iteration: the keys of now."""

    now: Keys = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.now)


def cores() -> int:
    """Cores that this rank may use: those of the process, shared with the other ranks of the machine."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class StreamedTrain:
    """Like koala.data.resident.TrainSamples, from rows that are still encoded."""

    def __init__(self, pool: Pool, spec: ImageSpec, augment: Augment, loading: Loading, count: int):
        self._pool, self._size, self.augment, self._loading = pool, spec.size, augment, loading
        self._steps = loading.steps(count, spec.drop_last)
        self.samples_per_step, self.steps_per_epoch = loading.batch_size, len(self._steps)

    def samples(self, index: int, epoch: int = 0) -> int:
        """Images of global step ``index``."""
        return self._steps.size(index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        count, seed = self._steps.count, self._loading.seed
        order = shuffled(count, seed, epoch)
        draws = self.augment.draw(count, self._size, seed, epoch).to(self._loading.device)
        batches = [self._steps.of_rank(step) for step in range(start, self.steps_per_epoch)]
        keys = (
            [("train", row, epoch, position) for position, row in enumerate(order[batch].tolist(), batch.start)]
            for batch in batches
        )
        for batch, (images, labels) in zip(batches, self._pool.batches(keys), strict=True):
            yield Batch(self.augment(images, draws[batch]), labels)


class StreamedEval:
    """Like koala.data.resident.EvalSamples, from rows that are still encoded."""

    def __init__(self, pool: Pool, augment: Augment, split: str, count: int, loading: Loading) -> None:
        self._pool, self.augment, self.count = pool, augment, count
        parts = loading.eval_parts(count)
        self._keys = [[(split, row, -1, -1) for row in range(part.start, part.stop)] for part in parts]

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self._pool.batches(iter(self._keys)):
            yield Batch(self.augment(images), labels)


def build(spec: ImageSpec, loading: Loading) -> Data:
    """See koala.data.build."""
    if spec.crop_padding:
        raise ConfigError("data.crop_padding", spec.crop_padding, "a streamed set is cropped by resizing", valid="0")
    if spec.resize:
        raise ConfigError("data.resize", spec.resize, "a streamed set is resized to data.size", valid="null")
    if not (spec.path or spec.hub):
        raise ConfigError("data", spec.name, "a streamed set needs data.path or data.hub")
    splits = encoded(spec, Path(loading.data_root))
    images = splits["train"]
    rest, chosen = carve(images.labels, spec, loading)
    if len(chosen):
        splits |= {"train": images.select(rest), "val": images.select(chosen)}
    augment = Augment(spec.mean, spec.std, flip=spec.flip, cutout=spec.cutout, device=loading.device)
    workers = cores() if spec.workers is None else spec.workers
    pool = Pool(Decoded(splits, spec, loading.seed), workers, torch.device(loading.device))
    return Data(
        train=StreamedTrain(pool, spec, augment, loading, len(splits["train"].labels)),
        evaluation={
            split: StreamedEval(pool, augment, split, len(splits[split].labels), loading)
            for split in ("val", "test")
            if split in splits
        },
        kind="images",
        num_classes=spec.classes,
        input_shape=spec.input_shape,
        commit=commit_of(spec),
    )
