"""Image sets too large for the device: decoded, cropped and resized by worker processes while the network
trains.

Workers give uint8 images of the right size; flip, cutout and normalisation happen on the device, a batch at a
time. A sample's crop depends on (seed, epoch, position in the epoch's order) alone, so that neither the
number of workers nor of ranks changes it, and a resumed epoch starts without decoding what it skips.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from koala.data.augment import Augment
from koala.data.base import Batch, Data, eval_parts, generator, part, shuffled
from koala.data.cache import pixels
from koala.data.sources import carve, labels_of, rows
from koala.data.spec import ImageSpec
from koala.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset as Rows

Key = tuple[int, int]  # position in the epoch's order, row in the data set


class Decoded(Dataset):
    """Decoded rows, uint8 [C, size, size] with their labels, by (position, row).

    Training (``seed`` is given): a random crop of 8 % to 100 % of the image, resized. Evaluation: the central
    crop of an image whose shorter side has been resized to 256/224 of ``size``. Both as is usual for
    ImageNet.
    """

    def __init__(self, table: "Rows", spec: ImageSpec, *, seed: int | None = None, epoch: int = 0) -> None:
        self.table, self.spec, self.seed, self.epoch = table, spec, seed, epoch
        if seed is None:
            self.crop = v2.Compose([v2.Resize(round(spec.size * 256 / 224)), v2.CenterCrop(spec.size)])
        else:
            self.crop = v2.RandomResizedCrop(spec.size)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        position, row = key
        encoded = self.table[row]
        image = pixels(encoded["image"], self.spec)
        if self.seed is None:
            return self.crop(image), encoded["label"]
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(generator(self.seed, self.epoch, "resized crop", position).initial_seed())
            return self.crop(image), encoded["label"]

    def collate(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Stacks samples, also none of them: a rank's part of a very small evaluation may be empty."""
        shape = (len(samples), self.spec.channels, self.spec.size, self.spec.size)
        images = torch.empty(shape, dtype=torch.uint8)
        for slot, (image, _) in zip(images, samples, strict=True):
            slot.copy_(image)
        return images, torch.tensor([label for _, label in samples], dtype=torch.int64)

    def batches(self, keys: list[list[Key]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, labels) on ``device`` for each list of keys, decoded ahead by the workers."""
        loader = DataLoader(
            self,
            batch_sampler=keys,
            num_workers=self.spec.workers,
            collate_fn=self.collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or else it draws from the global one, and resuming is not exact
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class StreamedTrain:
    """Like koala.data.images.TrainImages, from rows that are still encoded."""

    def __init__(
        self,
        table: "Rows",
        spec: ImageSpec,
        augment: Augment,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.table, self.spec, self.augment, self.seed, self.device = table, spec, augment, seed, device
        self.samples_per_step = batch_size
        self.steps_per_epoch = len(table) // batch_size
        self._mine = part(batch_size, rank, world)

    def samples(self, index: int) -> int:
        """Images of global step ``index``: the same for every step."""
        return self.samples_per_step

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        order = shuffled(len(self.table), self.seed, epoch).tolist()
        draws = self.augment.draw(len(order), self.spec.size, self.seed, epoch).to(self.device)
        firsts = [step * self.samples_per_step for step in range(start, self.steps_per_epoch)]
        mine = [slice(first + self._mine.start, first + self._mine.stop) for first in firsts]
        keys = [list(enumerate(order[chosen], chosen.start)) for chosen in mine]
        decoded = Decoded(self.table, self.spec, seed=self.seed, epoch=epoch)
        for chosen, (images, labels) in zip(mine, decoded.batches(keys, self.device), strict=True):
            yield Batch(self.augment(images, draws[chosen]), labels)


class StreamedEval:
    """Like koala.data.images.EvalImages, from rows that are still encoded."""

    def __init__(
        self,
        table: "Rows",
        spec: ImageSpec,
        augment: Augment,
        *,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.decoded, self.augment, self.device = Decoded(table, spec), augment, device
        self.count = len(table)
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
        raise ConfigError(
            f"data.crop_padding={spec.crop_padding}: a streamed set is cropped by resizing; valid: 0"
        )
    if not (spec.path or spec.hub):
        raise ConfigError(f"data={spec.name}: a streamed set needs data.path or data.hub")
    tables = rows(spec, data_root)
    table, held_out = tables["train"], {}
    rest, chosen = carve(labels_of(table), spec, batch_size)
    if len(chosen):
        held_out["val"] = table.select(chosen.tolist())
        table = table.select(rest.tolist())
    held_out["test"] = tables["test"]
    augment = Augment(spec.mean, spec.std, flip=spec.flip, cutout=spec.cutout, device=device)
    common = {"rank": rank, "world": world, "device": device}
    return Data(
        train=StreamedTrain(table, spec, augment, seed=seed, batch_size=batch_size, **common),
        evaluation={
            split: StreamedEval(rows, spec, augment, batch_size=eval_batch_size, **common)
            for split, rows in held_out.items()
        },
        kind="images",
        num_classes=spec.classes,
        input_shape=(spec.channels, spec.size, spec.size),
    )
