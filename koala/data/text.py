"""Text: a stream of tokens becomes batches for language models.

For truncated back-propagation through time the training stream is cut into ``batch_size`` columns that are read side by
side, ``bptt`` tokens at a step, so that a recurrent model may carry its state from step to step; an epoch is one pass,
always in the same order. Or the stream is cut into windows, which are shuffled and each a context of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from koala.data import tokens
from koala.data.base import Batch, Data, Loading, generator, part, shuffled
from koala.data.spec import TextSpec
from koala.errors import ConfigError

IGNORED = -100  # a target that is not scored: cross_entropy's default ignore_index


class TrainColumns:
    """Training batches: this rank's columns of the stream, ``bptt`` tokens at a time.

    Args:
        stream: int64 [tokens]; what does not fill the columns is left out at the end.
        spec: ``bptt`` inputs of a column in one step, and fewer in the last one of an epoch; with ``bptt_random``
            lengths are drawn around it (``drawn_lengths``), and each epoch has another order of them.
        loading: ``batch_size`` columns over all ranks.
    """

    def __init__(self, stream: Tensor, spec: TextSpec, loading: Loading):
        columns, bptt, seed = loading.batch_size, spec.bptt, loading.seed if spec.bptt_random else None
        length = len(stream) // columns
        table = stream[: columns * length].view(columns, length)
        self._columns = table[part(columns, loading.rank, loading.world)]
        scored = length - 1  # the last token of a column is nobody's input
        self._width, self._seed = columns, seed
        if seed is None:
            self._lengths = torch.tensor([min(bptt, scored - begin) for begin in range(0, scored, bptt)])
        else:
            self._lengths = drawn_lengths(scored, bptt, seed)
        self.steps_per_epoch = len(self._lengths)
        self.samples_per_step = round(columns * scored / len(self._lengths)) if seed is not None else self.samples(0)
        self.longest = int(self._lengths.max())

    def lengths(self, epoch: int) -> list[int]:
        """Inputs of a column in each step of ``epoch``."""
        if self._seed is None:
            return self._lengths.tolist()
        return self._lengths[shuffled(len(self._lengths), self._seed, epoch)].tolist()

    def samples(self, index: int, epoch: int = 0) -> int:
        """Scored tokens of global step ``index`` of ``epoch``."""
        return self._width * self.lengths(epoch)[index]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of steps ``start``, ``start + 1``, ...; ``start`` is True at an epoch's first."""
        lengths = self.lengths(epoch)
        begin = sum(lengths[:start])
        for step in range(start, self.steps_per_epoch):
            end = begin + lengths[step]
            yield Batch(self._columns[:, begin:end], self._columns[:, begin + 1 : end + 1], start=step == 0)
            begin = end


def drawn_lengths(scored: int, bptt: int, seed: int) -> Tensor:
    """Lengths of steps that sum to ``scored``: N(bptt, 5^2), once in 20 N(bptt / 2, 5^2), but at least 5 (the last may
    be shorter). AWD-LSTM draws new ones in each epoch; here an epoch has another order of them, so that all epochs
    have the same number of steps.
    """
    source = generator(seed, "bptt")
    count = 2 * scored // bptt + 20
    mean = torch.where(torch.rand(count, generator=source) < 0.95, float(bptt), bptt / 2)
    ends = torch.normal(mean, 5.0, generator=source).int().clamp(min=5).cumsum(0).clamp(max=scored)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    return lengths[lengths > 0]


class Windows:
    """A stream cut into windows of ``bptt`` inputs with their next tokens, back to back; the last one is padded.

    ``inputs``, ``targets``: int64 [windows, bptt], inputs padded by 0 and targets by ``IGNORED``.
    """

    def __init__(self, stream: Tensor, bptt: int):
        self.scored = len(stream) - 1  # the first token is nobody's target
        self.count = -(-self.scored // bptt)
        self.last = self.scored - (self.count - 1) * bptt  # scored tokens of the last one
        self.inputs = stream.new_zeros(self.count, bptt)
        self.inputs.view(-1)[: self.scored] = stream[:-1]
        self.targets = stream.new_full((self.count, bptt), IGNORED)
        self.targets.view(-1)[: self.scored] = stream[1:]


class TrainWindows:
    """Training batches of shuffled windows, each a context of its own; the last incomplete batch is kept."""

    def __init__(self, stream: Tensor, spec: TextSpec, loading: Loading):
        self.windows, self.bptt, self.seed = Windows(stream, spec.bptt), spec.bptt, loading.seed
        self._steps = loading.steps(self.windows.count, drop_last=False)
        self.steps_per_epoch, self.samples_per_step = len(self._steps), loading.batch_size * spec.bptt
        self._order = (-1, torch.empty(0))  # of the last requested epoch

    def order(self, epoch: int) -> Tensor:
        """Windows in the order of ``epoch``."""
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self.windows.count, self.seed, epoch))
        return self._order[1]

    def samples(self, index: int, epoch: int = 0) -> int:
        """Scored tokens of global step ``index`` of ``epoch``: fewer if the padded window is among them."""
        first, count = index * self._steps.batch_size, self._steps.size(index)
        padded = (self.order(epoch)[first : first + count] == self.windows.count - 1).any().item()
        return count * self.bptt - padded * (self.bptt - self.windows.last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's part of global steps ``start``, ... of ``epoch``."""
        order = self.order(epoch).to(self.windows.inputs.device)
        for step in range(start, self.steps_per_epoch):
            chosen = order[self._steps.of_rank(step)]
            yield Batch(self.windows.inputs[chosen], self.windows.targets[chosen])


class EvalWindows:
    """Evaluation batches of windows in order: every token but the first is a target once.

    ``slots``: tokens that these windows would have if all batches of ``spec.eval_columns`` windows were full; the
    older perplexity divides the loss by it.
    """

    def __init__(self, stream: Tensor, spec: TextSpec, loading: Loading):
        self.windows = Windows(stream, spec.bptt)
        self.count = self.windows.scored
        self.slots = -(-self.windows.count // spec.eval_columns) * spec.eval_columns * spec.bptt
        self._parts = loading.eval_parts(self.windows.count)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._parts:
            yield Batch(self.windows.inputs[rows], self.windows.targets[rows])


class EvalColumns:
    """Evaluation batches: every token is a target exactly once, the first one after an ``<eos>`` put in front.

    Args:
        stream: int64 [tokens].
        eos: id of ``<eos>``.
        spec: ``eval_columns``, each read from the zero state: part of the metric's definition; ``bptt`` tokens at a
            time (for a Transformer: the longest context).
        loading: ``eval_batch_size`` columns, at most, are processed together; the metric does not depend on it.
    """

    def __init__(self, stream: Tensor, eos: int, spec: TextSpec, loading: Loading):
        self.count, columns = len(stream), spec.eval_columns
        length = -(-self.count // columns)
        grid = (columns, length)
        self._inputs = stream.new_full(grid, eos)
        self._inputs.view(-1)[1 : self.count] = stream[:-1]
        self._targets = stream.new_full(grid, IGNORED)
        self._targets.view(-1)[: self.count] = stream
        self._bptt = spec.bptt
        self._groups = loading.eval_parts(columns)  # the same number on every rank

    def __iter__(self) -> Iterator[Batch]:
        """Yields this rank's batches; ``start`` is True at the beginning of each group of columns."""
        for columns in self._groups:
            inputs, targets = self._inputs[columns], self._targets[columns]
            for begin in range(0, inputs.shape[1], self._bptt):
                window = slice(begin, begin + self._bptt)
                yield Batch(inputs[:, window], targets[:, window], start=begin == 0)


def build(spec: TextSpec, loading: Loading) -> Data:
    """Builds a text data set; see :func:`koala.data.build`. Only windows and drawn lengths depend on ``seed``."""
    batch_size = loading.batch_size
    if batch_size < loading.world:
        raise ConfigError(
            "batch_size", batch_size, "is cut in one part for each rank", valid=f"{loading.world} or more"
        )
    text = tokens.load(spec, Path(loading.data_root))
    streams = {split: stream.to(loading.device) for split, stream in text.streams.items()}
    count = len(streams["train"])
    largest = -(-(count - 1) // spec.bptt) if spec.windows else count // 2
    if batch_size > largest:
        reason = f"{spec.name} has {count} training tokens"
        raise ConfigError("batch_size", batch_size, reason, valid=f"{loading.world} to {largest}")
    length = spec.bptt
    if spec.windows:
        train = TrainWindows(streams["train"], spec, loading)
        held_out = {split: EvalWindows(streams[split], spec, loading) for split in ("val", "test")}
    else:
        train = TrainColumns(streams["train"], spec, loading)
        length = max(length, train.longest)
        before = text.vocabulary.index(tokens.EOS) if tokens.EOS in text.vocabulary else 0
        held_out = {split: EvalColumns(streams[split], before, spec, loading) for split in ("val", "test")}
    classes = len(text.vocabulary)
    return Data(train, held_out, kind="text", num_classes=classes, input_shape=(length,), commit=text.commit)
