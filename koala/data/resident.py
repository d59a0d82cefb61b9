"""Sets of samples with classes that live on the device, prepared there a batch at a time, without worker processes."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from koala.data.augment import Draws
from koala.data.base import Batch, Data, Loading, shuffled
from koala.data.cache import Kept, cached
from koala.data.fingerprint import fingerprint
from koala.data.spec import LabelledSpec
from koala.data.splits import carve
from koala.data.tables import check_labels, commit_of

Splits = dict[str, tuple[Tensor, Tensor]]


def kept(
    spec: LabelledSpec, data_root: Path, decided_by: tuple, make: Callable[[], tuple[Splits, int | None]]
) -> tuple[Splits, str | None]:
    """Returns {"train", "test"}: samples and int64 labels [N], made now or earlier; and the hub's commit that they are
    of, if known.

    Args:
        decided_by: what decides the samples, beside the content of the set and the names of its columns and splits.
        make: returns the splits, and the number of classes where the set itself says it.
    """
    decided_by = (*decided_by, fingerprint(spec, data_root), spec.columns, spec.train_split, spec.test_split)
    file = data_root / f"{spec.name}-{hashlib.sha256(repr(decided_by).encode()).hexdigest()[:12]}.safetensors"

    def tensors() -> Kept:
        splits, classes = make()
        named = {f"{split}.{name}": tensor for split, pair in splits.items()
                 for name, tensor in zip(("samples", "labels"), pair, strict=True)}  # fmt: skip
        return Kept(named, {"classes": str(classes or ""), "commit": commit_of(spec) or ""})

    stored, notes = cached(file, tensors)
    splits = {split: (stored[f"{split}.samples"], stored[f"{split}.labels"]) for split in ("train", "test")}
    for split, (_, labels) in splits.items():
        check_labels(spec, split, labels, int(notes["classes"] or 0) or None)
    return splits, notes.get("commit") or None


class Prepare(Protocol):
    """Turns chosen samples into the inputs of a network, as ``koala.data.augment.Augment`` does."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> Draws:
        """Returns the random numbers of an epoch of ``count`` samples, whose last dimension is ``size``."""

    def __call__(self, samples: Tensor, draws: Draws | None = None) -> Tensor:
        """Returns the inputs of some samples; with draws, for training."""


class TrainSamples:
    """Shuffled batches of samples that are on the device.

    Args:
        samples, labels: [N, ...] and int64 [N], on the device.
        prepare: what turns chosen samples into network inputs.
        drop_last: leave out the last incomplete batch.
    """

    def __init__(self, samples: Tensor, labels: Tensor, prepare: Prepare, loading: Loading, drop_last: bool = True):
        self.inputs, self.labels, self.prepare, self.seed = samples, labels, prepare, loading.seed
        self._steps = loading.steps(len(samples), drop_last)
        self.samples_per_step, self.steps_per_epoch = loading.batch_size, len(self._steps)

    def samples(self, index: int, epoch: int = 0) -> int:
        """Samples of global step ``index``."""
        return self._steps.size(index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        count, device = len(self.inputs), self.inputs.device
        order = shuffled(count, self.seed, epoch).to(device)
        draws = self.prepare.draw(count, self.inputs.shape[-1], self.seed, epoch).to(device)
        for step in range(start, self.steps_per_epoch):
            positions = self._steps.of_rank(step)
            chosen = order[positions]
            yield Batch(self.prepare(self.inputs[chosen], draws[positions]), self.labels[chosen])


class EvalSamples:
    """Every sample once over all ranks, in order, not augmented."""

    def __init__(self, samples: Tensor, labels: Tensor, prepare: Prepare, loading: Loading):
        self.inputs, self.labels, self.prepare, self.count = samples, labels, prepare, len(samples)
        self._parts = loading.eval_parts(self.count)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._parts:
            yield Batch(self.prepare(self.inputs[rows]), self.labels[rows])


def held(spec: LabelledSpec, splits: Splits, prepare: Prepare, loading: Loading, commit: str | None) -> Data:
    """Returns the data set of ``splits``, whose validation samples are carved from training, on the device."""
    samples, labels = splits["train"]
    rest, chosen = carve(labels, spec, loading)
    parts = {"train": (samples, labels), "test": splits["test"]}
    if len(chosen):
        parts |= {"train": (samples[rest], labels[rest]), "val": (samples[chosen], labels[chosen])}
    parts = {split: (x.to(loading.device), y.to(loading.device)) for split, (x, y) in parts.items()}
    return Data(
        train=TrainSamples(*parts["train"], prepare, loading, spec.drop_last),
        evaluation={split: EvalSamples(*parts[split], prepare, loading) for split in ("val", "test") if split in parts},
        kind=spec.kind,
        num_classes=spec.classes,
        input_shape=spec.input_shape,
        commit=commit,
    )
