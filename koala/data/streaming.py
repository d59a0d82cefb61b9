"""Image sets too large for the device: decoded, cropped and resized by worker processes while the network
trains.

Workers give uint8 images of the right size; flip, cutout and normalisation happen on the device, a batch at a
time. A sample's crop depends on (seed, epoch, position in the epoch's order) alone, so that neither the
number of workers nor of ranks changes it, and a resumed epoch starts without decoding what it skips.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from koala.data.augment import Augment
from koala.data.base import Batch, Data, Steps, eval_parts, generator, shuffled
from koala.data.decode import pixels
from koala.data.encoded import Encoded
from koala.data.sources import encoded
from koala.data.spec import ImageSpec
from koala.data.splits import carve
from koala.errors import ConfigError

Key = tuple[int, int]  # position in the epoch's order, row in the data set


class Decoded(Dataset):
    """Decoded images, uint8 [C, size, size] with their labels, by (position, row).

    Training (``seed`` is given): a random crop of 8 % to 100 % of the image, resized. Evaluation: the central
    crop of an image whose shorter side has been resized to 256/224 of ``size``. Both as is usual for
    ImageNet.
    """

    def __init__(self, source: Encoded, spec: ImageSpec, *, seed: int | None = None, epoch: int = 0) -> None:
        self.source, self.spec, self.seed, self.epoch = source, spec, seed, epoch
        if seed is None:
            self.crop = v2.Compose([v2.Resize(round(spec.size * 256 / 224)), v2.CenterCrop(spec.size)])
        else:
            self.crop = v2.RandomResizedCrop(spec.size)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | ConfigError:
        position, row = key
        try:
            image = pixels(self.source, row, self.spec.channels)
        except ConfigError as error:
            return error  # raised in a worker it would arrive inside that worker's traceback
        label = int(self.source.labels[row])
        if self.seed is None:
            return self.crop(image), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(generator(self.seed, self.epoch, "resized crop", position).initial_seed())
            return self.crop(image), label

    def collate(self, samples: list[tuple[Tensor, int] | ConfigError]) -> tuple[Tensor, Tensor] | ConfigError:
        """Stacks samples, also none of them: a rank's part of a very small evaluation may be empty."""
        for sample in samples:
            if isinstance(sample, ConfigError):
                return sample
        shape = (len(samples), self.spec.channels, self.spec.size, self.spec.size)
        images = torch.empty(shape, dtype=torch.uint8)
        for slot, (image, _) in zip(images, samples, strict=True):
            slot.copy_(image)
        return images, torch.tensor([label for _, label in samples], dtype=torch.int64)

    def batches(self, keys: list[list[Key]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, labels) on ``device`` for each list of keys, decoded ahead by the workers.

        Raises:
            ConfigError: there is a row that cannot be decoded.
        """
        loader = DataLoader(
            self,
            batch_sampler=keys,
            num_workers=self.spec.workers,
            collate_fn=self.collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or else it draws from the global one, and resuming is not exact
        )
        for batch in loader:
            if isinstance(batch, ConfigError):
                raise batch
            images, labels = batch
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class StreamedTrain:
    """Like koala.data.images.TrainImages, from rows that are still encoded."""

    def __init__(
        self,
        images: Encoded,
        spec: ImageSpec,
        augment: Augment,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.images, self.spec, self.augment, self.seed, self.device = images, spec, augment, seed, device
        self._steps = Steps(len(images.labels), batch_size, spec.drop_last, rank, world)
        self.samples_per_step, self.steps_per_epoch = batch_size, len(self._steps)

    def samples(self, index: int, epoch: int = 0) -> int:
        """Images of global step ``index``."""
        return self._steps.size(index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        order = shuffled(len(self.images.labels), self.seed, epoch).tolist()
        draws = self.augment.draw(len(order), self.spec.size, self.seed, epoch).to(self.device)
        mine = [self._steps.own(step) for step in range(start, self.steps_per_epoch)]
        keys = [list(enumerate(order[chosen], chosen.start)) for chosen in mine]
        decoded = Decoded(self.images, self.spec, seed=self.seed, epoch=epoch)
        for chosen, (images, labels) in zip(mine, decoded.batches(keys, self.device), strict=True):
            yield Batch(self.augment(images, draws[chosen]), labels)


class StreamedEval:
    """Like koala.data.images.EvalImages, from rows that are still encoded."""

    def __init__(
        self,
        images: Encoded,
        spec: ImageSpec,
        augment: Augment,
        *,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.decoded, self.augment, self.device = Decoded(images, spec), augment, device
        self.count = len(images.labels)
        parts = eval_parts(self.count, batch_size, rank, world)
        self._keys = [[(row, row) for row in range(mine.start, mine.stop)] for mine in parts]

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.decoded.batches(self._keys, self.device):
            yield Batch(self.augment(images), labels)


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
    """See koala.data.build."""
    if spec.crop_padding:
        raise ConfigError(f"data.crop_padding={spec.crop_padding}: a streamed set is cropped by resizing; valid: 0")
    if spec.resize:
        raise ConfigError(f"data.resize={spec.resize}: a streamed set is resized to data.size; valid: null")
    if not (spec.path or spec.hub):
        raise ConfigError(f"data={spec.name}: a streamed set needs data.path or data.hub")
    splits, held_out = encoded(spec, data_root), {}
    images = splits["train"]
    rest, chosen = carve(images.labels, spec, batch_size, world)
    if len(chosen):
        held_out["val"], images = images.select(chosen), images.select(rest)
    held_out["test"] = splits["test"]
    augment = Augment(spec.mean, spec.std, flip=spec.flip, cutout=spec.cutout, device=device)
    common = {"rank": rank, "world": world, "device": device}
    return Data(
        train=StreamedTrain(images, spec, augment, seed=seed, batch_size=batch_size, **common),
        evaluation={
            split: StreamedEval(part, spec, augment, batch_size=eval_batch_size, **common)
            for split, part in held_out.items()
        },
        kind="images",
        num_classes=spec.classes,
        input_shape=(spec.channels, spec.size, spec.size),
    )
