"""What a data set is to the rest of the package: a source of training batches and some of evaluation batches.

Everything a source yields is a pure function of (seed, epoch, step) and of the data set: permutations and
augmentations are drawn for the *global* batch and then sliced for the rank. So a resumed run needs no saved
sampler state, and another number of ranks trains on the same global batches.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One rank's part of a batch.

    Images: ``inputs`` float32 [B, C, H, W], ``targets`` int64 [B]. Sentences: ``inputs`` int64 [B, T], negative where
    there is no token, ``targets`` int64 [B]. Text: both int64 [B, T]; a target of -100 is not scored. ``start`` says
    that recurrent state is to be reset before this batch.
    """

    inputs: Tensor
    targets: Tensor
    start: bool = True


@dataclass(frozen=True)
class Loading:
    """How a data set is read, beside what it is.

    Args:
        seed: of the order of the samples and of the augmentation; splits have a fixed seed of their own.
        batch_size: of a global training batch, over all ranks (images, or columns of text).
        eval_batch_size: of each rank's evaluation batch, at most; results do not depend on it.
        rank, world: which part of every global batch to yield.
        accumulation: pieces that each rank splits its part into.
        device: where the batches are.
        data_root: folder below which decoded data is cached.
    """

    seed: int
    batch_size: int
    eval_batch_size: int = 500
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    device: torch.device | str = "cpu"
    data_root: Path | str = "data"

    def steps(self, count: int, drop_last: bool) -> "Steps":
        """How an epoch of ``count`` samples is cut into global batches."""
        return Steps(count, self.batch_size, drop_last, self.rank, self.world)

    def eval_parts(self, count: int) -> list[slice]:
        """``range(count)`` in parts of at most ``eval_batch_size``, the same number for each rank; this rank's."""
        batches = -(-count // (self.eval_batch_size * self.world))
        return [part(count, batch * self.world + self.rank, batches * self.world) for batch in range(batches)]


class TrainSource(Protocol):
    """Training batches. ``samples_per_step`` counts the scored targets of one full *global* step."""

    steps_per_epoch: int
    samples_per_step: int

    def samples(self, index: int, epoch: int = 0) -> int:
        """Scored targets of global step ``index`` of ``epoch``: fewer than usual if the step is short."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ``start + 1``, ... of ``epoch``."""


class EvalSource(Protocol):
    """Evaluation batches: over all ranks, each of ``count`` samples (or tokens) exactly once.

    Every rank yields the same number of batches, so that sharded models may communicate in forward; a batch
    may be empty on some rank when the set is smaller than the number of ranks.
    """

    count: int

    def __iter__(self) -> Iterator[Batch]:
        """Yields this rank's batches, in the same order each time."""


@dataclass
class Data:
    """A data set, ready to train on.

    ``kind`` is "images", "sentences" or "text"; ``num_classes`` the number of classes or the vocabulary's size;
    ``input_shape`` the shape of one sample, (C, H, W) or (T,). ``evaluation`` has the keys "val" (when there is a
    validation split) and "test". ``commit`` is the hub's that was read, None where there is no hub or it did not say.
    ``vocabulary`` is above every token of sentences.
    """

    train: TrainSource
    evaluation: dict[str, EvalSource]
    kind: str
    num_classes: int
    input_shape: tuple[int, ...]
    commit: str | None = None
    vocabulary: int = 0


def generator(*key: int | str) -> torch.Generator:
    """Returns a CPU generator seeded by a hash of ``key``: nearby keys give unrelated streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def part(total: int, index: int, count: int) -> slice:
    """Returns the ``index``-th of ``count`` consecutive slices of ``range(total)``, even to within one."""
    return slice(total * index // count, total * (index + 1) // count)


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """Returns the order in which ``epoch`` visits ``count`` samples."""
    return torch.randperm(count, generator=generator(seed, epoch, "order"))


@dataclass(frozen=True)
class Steps:
    """How an epoch's order of ``count`` samples is cut into global batches, and which part of each is this rank's.

    The last incomplete batch is left out if ``drop_last``, and else a step of its own.
    """

    count: int
    batch_size: int
    drop_last: bool
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def size(self, index: int) -> int:
        """Samples of global batch ``index``."""
        return min(self.batch_size, self.count - index * self.batch_size)

    def of_rank(self, index: int) -> slice:
        """This rank's positions in the epoch's order."""
        positions, first = part(self.size(index), self.rank, self.world), index * self.batch_size
        return slice(first + positions.start, first + positions.stop)
