"""Image sets in memory: order, augmentation, ranks, splits. The truth is indexing written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from koala.data import Loading, build
from koala.data.augment import Augment
from koala.data.resident import EvalSamples, TrainSamples
from koala.data.splits import stratified
from tests.refused import ANY, refused

DIGITS = {
    "name": "digits", "kind": "images", "classes": 10, "size": 8, "channels": 1,
    "mean": [78.0], "std": [95.9], "crop_padding": 1, "validation": 180,
}  # fmt: skip


def digits(cfg=(), **arguments):
    return build(DIGITS | dict(cfg), Loading(**{"seed": 1, "batch_size": 32, "eval_batch_size": 100} | arguments))


def numbered(count: int, size: int = 6) -> torch.Tensor:
    """Images [count, 3, size, size] of which no two pixels of a channel's row or column are alike."""
    row, column = torch.arange(size).view(-1, 1), torch.arange(size).view(1, -1)
    pixel = (1 + row * size + column).expand(3, size, size) + torch.tensor([0, 60, 120]).view(3, 1, 1)
    return (pixel + torch.arange(count).view(-1, 1, 1, 1)).to(torch.uint8)


def train_source(count=37, batch_size=8, rank=0, world=1, seed=3, drop_last=True, **augment):
    loading = Loading(seed, batch_size, rank=rank, world=world)
    return TrainSamples(numbered(count), torch.arange(count), Augment([0.0], [1.0], **augment), loading, drop_last)


def joined(source, epoch=0, start=0):
    batches = list(source.epoch(epoch, start))
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_last_incomplete_batch():
    source = train_source()
    images, labels = joined(source)
    assert source.steps_per_epoch == 4 and len(labels) == 32 == 4 * source.samples(3)
    assert len(labels.unique()) == 32
    assert torch.equal(images, numbered(37)[labels].float())  # no augmentation: images stay with their labels


def test_order_changes_with_epoch_and_seed_only():
    _, first = joined(train_source())
    assert torch.equal(first, joined(train_source())[1])
    assert not torch.equal(first, joined(train_source(), epoch=1)[1])
    assert not torch.equal(first, joined(train_source(seed=4))[1])


def test_crop_is_a_window_of_the_zero_padded_image_and_flip_mirrors_it():
    source = train_source(count=160, batch_size=160, crop_padding=2, flip=True)
    images, labels = joined(source)
    draws = source.prepare.draw(160, 6, seed=3, epoch=0)
    padded = F.pad(numbered(160), [2, 2, 2, 2]).float()
    for image, label, (top, left), flip in zip(images, labels, draws.crop.tolist(), draws.flip, strict=True):
        window = padded[label, :, top : top + 6, left : left + 6]
        assert torch.equal(image, window.flip(-1) if flip else window)
    corners = {tuple(corner) for corner in draws.crop.tolist()}
    assert len(corners) == 25  # every one of the (2 * 2 + 1)^2 places is met
    assert 50 < draws.flip.sum() < 110


def test_normalisation_is_by_channel():
    augment = Augment([1.0, 2.0, 3.0], [2.0, 4.0, 8.0])
    got = augment(torch.full((2, 3, 4, 4), 11, dtype=torch.uint8))
    assert got.dtype == torch.float32
    assert torch.allclose(got[0, :, 0, 0], torch.tensor([5.0, 9 / 4, 1.0]))


def test_cutout_sets_a_clipped_square_to_the_mean_and_leaves_the_crops_alone():
    plain, cut = (train_source(count=64, batch_size=64, crop_padding=1, cutout=side) for side in (0, 4))
    (before, _), (after, _) = joined(plain), joined(cut)
    centres = cut.prepare.draw(64, 6, seed=3, epoch=0).cutout.tolist()
    for image, untouched, (row, column) in zip(after, before, centres, strict=True):
        expected = untouched.clone()
        expected[:, max(0, row - 2) : row + 2, max(0, column - 2) : column + 2] = 0.0
        assert torch.equal(image, expected)


def test_resuming_at_a_step_gives_the_rest_of_the_epoch():
    source = train_source(crop_padding=1, flip=True, cutout=2)
    images, labels = joined(source, epoch=5)
    late_images, late_labels = joined(source, epoch=5, start=2)
    assert torch.equal(late_images, images[16:]) and torch.equal(late_labels, labels[16:])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch_and_its_augmentation(world):
    augment = {"crop_padding": 1, "flip": True, "cutout": 2}
    entire = list(train_source(**augment).epoch(2))
    ranks = [list(train_source(rank=rank, world=world, **augment).epoch(2)) for rank in range(world)]
    for step, batch in enumerate(entire):
        assert torch.equal(torch.cat([rank[step].inputs for rank in ranks]), batch.inputs)
        assert torch.equal(torch.cat([rank[step].targets for rank in ranks]), batch.targets)


@pytest.mark.parametrize("count", [1, 7, 64, 65])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_evaluation_counts_every_image_once_over_ranks(count, world, batch_size):
    images, labels = numbered(count), torch.arange(count)
    sources = [
        EvalSamples(images, labels, Augment([0.0], [1.0]), Loading(0, 1, batch_size, rank, world))
        for rank in range(world)
    ]
    batches = [list(source) for source in sources]
    assert len({len(rank) for rank in batches}) == 1  # as many on each rank: sharded models communicate
    assert all(len(batch.targets) <= batch_size for rank in batches for batch in rank)
    seen = torch.cat([batch.targets for rank in batches for batch in rank])
    assert torch.equal(seen.sort().values, labels)
    assert all(source.count == count for source in sources)


def test_digits_are_split_by_class_the_same_for_every_seed():
    one, other = digits(seed=1), digits(seed=2)
    assert {split: source.count for split, source in one.evaluation.items()} == {"val": 180, "test": 360}
    assert len(one.train.inputs) == 1797 - 540
    for split in ("val", "test"):
        assert torch.equal(one.evaluation[split].inputs, other.evaluation[split].inputs)
        counts = one.evaluation[split].labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 2  # the classes of the whole set have 174 to 183 images
    everything = torch.cat([one.train.inputs, *(source.inputs for source in one.evaluation.values())])
    ink = everything.float().mean((0, 1))
    from sklearn.datasets import load_digits

    assert torch.allclose(ink, torch.from_numpy(load_digits().images.mean(0)).float() * 255 / 16, atol=0.5)
    assert one.input_shape == (1, 8, 8) and one.num_classes == 10 and one.kind == "images"


def test_stratified_split_is_proportional_to_within_one():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2] * 1)
    for count in (0, 1, 10, 50, 99):
        rest, chosen = stratified(labels, count, "test")
        assert len(chosen) == count and torch.cat([rest, chosen]).sort().values.tolist() == list(range(100))
        share = labels[chosen].bincount(minlength=3) - labels.bincount() * count / 100
        assert share.abs().max() <= 1


def test_draws_differ_between_epochs_and_purposes():
    augment = Augment([0.0], [1.0], crop_padding=2, flip=True, cutout=2)
    one, other = (augment.draw(64, 5, seed=3, epoch=epoch) for epoch in (0, 1))
    assert not any(torch.equal(getattr(one, name), getattr(other, name)) for name in ("crop", "flip", "cutout"))
    assert not torch.equal(one.crop, one.cutout)  # both of 0 ... 4


def test_the_whole_set_is_one_batch_and_one_rank_takes_a_last_batch_of_any_size():
    assert digits(batch_size=1257).train.steps_per_epoch == 1
    assert digits({"drop_last": False}, batch_size=8, accumulation=4).train.samples(157) == 1


@pytest.mark.parametrize(
    ("cfg", "arguments", "key", "value", "valid"),
    [
        ({}, {"batch_size": 1258}, "batch_size", 1258, "1 to 1257"),
        ({}, {"batch_size": 0}, "batch_size", 0, "1 to 1257"),
        ({"validation": 1437}, {}, "data.validation", 1437, "0 to 1436"),
        ({"validation": -1}, {}, "data.validation", -1, ()),
        ({"classes": "ten"}, {}, "data.classes", "ten", ()),
        ({"flip": "perhaps"}, {}, "data.flip", "perhaps", ()),
        ({"channels": 2}, {}, "data.channels", 2, ()),
        ({"mean": [1.0, 2.0]}, {}, "data.mean", [1.0, 2.0], ()),
        ({"std": [0.0]}, {}, "data.std.0", 0.0, ()),
        ({"cutout": -4}, {}, "data.cutout", -4, ()),
        ({"kind": "sounds"}, {}, "data.kind", "sounds", ("images", "sentences", "text")),
        ({"streaming": True}, {}, "data.crop_padding", 1, "0"),
        ({"size": 32}, {}, "data.size", 32, "8"),
        ({"channels": 3}, {}, "data.channels", 3, "1"),
        ({"classes": 5}, {}, "data.classes", 5, "10"),
        ({"streaming": True, "crop_padding": 0}, {}, "data", "digits", ()),
        ({"drop_last": False}, {"batch_size": 8, "world": 2}, "data.drop_last", False, None),  # the last has 1 image
        ({"drop_last": False}, {"batch_size": 6, "world": 2, "accumulation": 2}, "data.drop_last", False, None),  # 3
    ],
)
def test_bad_config_is_named_by_key_and_value(cfg, arguments, key, value, valid):
    with refused(key, value, ANY if valid is None else valid):
        digits(cfg, **arguments)


@pytest.mark.parametrize("world", [1, 2])
def test_a_last_batch_that_is_kept_is_a_step_of_its_own(world):
    sources = [train_source(rank=rank, world=world, drop_last=False) for rank in range(world)]
    assert sources[0].steps_per_epoch == 5 and [sources[0].samples(step) for step in (0, 3, 4)] == [8, 8, 5]
    steps = [torch.cat([batch.targets for batch in step]) for step in zip(*(s.epoch(1) for s in sources), strict=True)]
    assert torch.cat(steps).sort().values.tolist() == list(range(37)) and len(steps[-1]) == 5
    dropped = joined(train_source(batch_size=8), epoch=1)[1]
    assert torch.equal(torch.cat(steps)[:32], dropped)


def test_resizing_is_pils_and_what_the_network_sees():
    from PIL import Image

    data = digits({"resize": 16})
    assert data.input_shape == (1, 16, 16) and next(iter(data.train.epoch(0))).inputs.shape[1:] == (1, 16, 16)
    small, large = digits().train.inputs[:20], data.train.inputs[:20]
    for before, after in zip(small, large, strict=True):
        truth = Image.fromarray(before[0].numpy()).resize((16, 16), Image.BILINEAR)
        assert (after[0].int() - torch.from_numpy(np.array(truth)).int()).abs().max() <= 1  # rounding


@pytest.mark.parametrize("purposes", [{}, {"crop_padding": 4, "flip": True}, {"cutout": 8}])
def test_augmentation_stays_on_the_device_of_its_images(purposes):
    """On a CUDA device that is not there, of which no value can be read."""
    with FakeTensorMode():
        augment = Augment([125.3], [63.0], **purposes, device="cuda")
        images = torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="cuda")
        draws = augment.draw(16, 32, seed=0, epoch=0).to(images.device)
        for augmented in (augment(images), augment(images, draws)):
            assert augmented.device == images.device
            assert (augmented.shape, augmented.dtype) == (images.shape, torch.float32)
