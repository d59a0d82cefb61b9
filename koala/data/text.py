"""Text: a stream of tokens becomes batches for language models with truncated back-propagation through time.

The training stream is cut into ``batch_size`` columns that are read side by side, ``bptt`` tokens at a step,
so that a recurrent model may carry its state from step to step. An epoch is one pass, always in the same
order: nothing is drawn.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from koala.data import tokens
from koala.data.base import Batch, Data, part
from koala.data.spec import TextSpec
from koala.errors import ConfigError

IGNORED = -100  # a target that is not scored: cross_entropy's default ignore_index


class TrainColumns:
    """Training batches: this rank's columns of the stream, ``bptt`` tokens at a time.

    Args:
        stream: int64 [tokens]; what does not fill the columns is left out at the end.
        columns: of the global batch.
        bptt: inputs of a column in one step; the last step of an epoch may be shorter.
        own: this rank's columns.
    """

    def __init__(self, stream: Tensor, columns: int, bptt: int, own: slice):
        length = len(stream) // columns
        self._columns = stream[: columns * length].view(columns, length)[own]
        self._scored = length - 1  # the last token of a column is nobody's input
        self._bptt, self._width = bptt, columns
        self.steps_per_epoch = -(-self._scored // bptt)
        self.samples_per_step = self.samples(0)

    def samples(self, index: int) -> int:
        """Scored tokens of global step ``index``."""
        return self._width * min(self._bptt, self._scored - index * self._bptt)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of steps ``start``, ``start + 1``, ...; ``start`` is True at an epoch's first."""
        for step in range(start, self.steps_per_epoch):
            begin = step * self._bptt
            end = min(begin + self._bptt, self._scored)
            yield Batch(self._columns[:, begin:end], self._columns[:, begin + 1 : end + 1], start=step == 0)


class EvalColumns:
    """Evaluation batches: every token is a target exactly once, the first one after an ``<eos>`` put in front.

    Args:
        stream: int64 [tokens].
        eos: id of ``<eos>``.
        columns: number of columns, each read from the zero state: part of the metric's definition.
        bptt: tokens at a time (for a Transformer: the longest context).
        batch: columns that a rank processes together, at most; the metric does not depend on it.
        rank, world: which columns are this rank's.
    """

    def __init__(self, stream: Tensor, eos: int, columns: int, bptt: int, batch: int, rank: int, world: int):
        self.count = len(stream)
        length = -(-self.count // columns)
        grid = (columns, length)
        self._inputs = stream.new_full(grid, eos)
        self._inputs.view(-1)[1 : self.count] = stream[:-1]
        self._targets = stream.new_full(grid, IGNORED)
        self._targets.view(-1)[: self.count] = stream
        self._bptt = bptt
        groups = -(-columns // (batch * world))  # the same number on every rank
        self._groups = [part(columns, group * world + rank, groups * world) for group in range(groups)]

    def __iter__(self) -> Iterator[Batch]:
        """Yields this rank's batches; ``start`` is True at the beginning of each group of columns."""
        for own in self._groups:
            inputs, targets = self._inputs[own], self._targets[own]
            for begin in range(0, inputs.shape[1], self._bptt):
                window = slice(begin, begin + self._bptt)
                yield Batch(inputs[:, window], targets[:, window], start=begin == 0)


def build(
    spec: TextSpec,
    *,
    seed: int,
    batch_size: int,
    eval_batch_size: int,
    rank: int,
    world: int,
    device: torch.device,
    data_root: Path,
) -> Data:
    """Builds a text data set; see :func:`koala.data.build`. ``seed`` is not used: a text has an order of its own."""
    if batch_size < world:
        raise ConfigError(f"batch_size={batch_size}: must be at least {world}, a column for each rank")
    text = tokens.load(spec, data_root)
    streams = {split: stream.to(device) for split, stream in text.streams.items()}
    count = len(streams["train"])
    if count // batch_size < 2:
        raise ConfigError(
            f"batch_size={batch_size}: must be at most {count // 2}, as {spec.name} has {count} training tokens"
        )
    eos = text.vocabulary.index(tokens.EOS)
    evaluation = {
        split: EvalColumns(streams[split], eos, spec.eval_columns, spec.bptt, eval_batch_size, rank, world)
        for split in ("val", "test")
    }
    train = TrainColumns(streams["train"], batch_size, spec.bptt, part(batch_size, rank, world))
    return Data(train, evaluation, kind="text", num_classes=len(text.vocabulary), input_shape=(spec.bptt,))
