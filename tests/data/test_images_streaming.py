"""Streamed image sets, on a few pictures that the tests make; PIL's own crops and resizing are the truth."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from koala.data import Loading, build, decode
from koala.data.encoded import Files
from koala.data.streaming import cores, random_box
from tests.data.image_sets import sample_image, write_folder, write_parquet
from tests.refused import refused

CFG = {
    "name": "stream", "kind": "images", "classes": 3, "size": 8, "channels": 3, "mean": [0.0], "std": [1.0],
    "streaming": True, "workers": 0, "flip": True, "test_split": "validation",
}  # fmt: skip
TRAIN, TEST, SIDE = range(14), range(20, 27), 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    write_parquet(path / "train-00000.parquet", TRAIN, "image", "label", size=SIDE)
    write_parquet(path / "validation-00000.parquet", TEST, "image", "label", size=SIDE)
    return path


def load(folder, *, seed=1, batch_size=4, rank=0, world=1, **cfg):
    return build(
        CFG | {"path": str(folder)} | cfg, Loading(seed, batch_size, 3, rank, world, data_root=folder / "cache")
    )


def joined(batches):
    batches = list(batches)
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_crops_of_the_whole_image_are_resized_as_pil_does(folder, monkeypatch):
    monkeypatch.setattr("koala.data.streaming.random_box", lambda *_: (0, 0, SIDE, SIDE))
    images, labels = joined(load(folder, flip=False, batch_size=14).train.epoch(0))
    assert images.shape == (14, 3, 8, 8) and images.dtype == torch.float32
    resized = [Image.fromarray(sample_image(k, SIDE)).resize((8, 8), Image.BILINEAR) for k in TRAIN]
    truth = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in resized])
    distance = torch.cdist(images.flatten(1), truth.flatten(1), p=torch.inf)
    assert distance.min(1).values.max() <= 2  # of 255: rounding
    assert sorted(distance.argmin(1).tolist()) == list(TRAIN)  # each once
    assert torch.equal(distance.argmin(1) % 3, labels)


def test_evaluation_is_the_central_crop_of_the_resized_image(folder):
    images, labels = joined(load(folder).evaluation["test"])
    assert labels.tolist() == [k % 3 for k in TEST]
    side = round(8 * 256 / 224)
    for image, k in zip(images, TEST, strict=True):
        resized = np.array(Image.fromarray(sample_image(k, SIDE)).resize((side, side), Image.BILINEAR))
        first = round((side - 8) / 2)
        central = torch.from_numpy(resized[first : first + 8, first : first + 8]).permute(2, 0, 1)
        assert (image - central).abs().max() <= 2


def test_workers_and_ranks_do_not_change_the_global_batches(folder):
    full = joined(load(folder).train.epoch(1))
    assert same(full, joined(load(folder, workers=2).train.epoch(1)))
    ranks = [list(load(folder, rank=rank, world=2).train.epoch(1)) for rank in range(2)]
    assert same(full, joined(batch for step in zip(*ranks, strict=True) for batch in step))


def test_epoch_and_seed_change_the_batches(folder):
    full = joined(load(folder).train.epoch(0))
    assert same(full, joined(load(folder).train.epoch(0)))
    assert not same(full, joined(load(folder).train.epoch(1)))
    assert not same(full, joined(load(folder, seed=2).train.epoch(0)))


def test_resuming_decodes_only_what_is_left_and_gives_the_same(folder, monkeypatch):
    source = load(folder).train
    images, labels = joined(source.epoch(3))
    decoded, original = [], __import__("koala.data.streaming", fromlist=["pixels"]).pixels
    monkeypatch.setattr("koala.data.streaming.pixels", lambda *args: decoded.append(1) or original(*args))
    assert same((images[8:], labels[8:]), joined(source.epoch(3, start=2)))
    assert len(decoded) == 4


def test_decoding_leaves_the_global_random_numbers_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    joined(load(folder).train.epoch(0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_counts_every_image_once_over_ranks(folder, world):
    sources = [load(folder, rank=rank, world=world).evaluation["test"] for rank in range(world)]
    parts = [joined(source) for source in sources]
    assert sum(len(labels) for _, labels in parts) == len(TEST) == sources[0].count
    assert len(torch.cat([images for images, _ in parts]).flatten(1).unique(dim=0)) == len(TEST)


def test_validation_is_carved_from_train(folder):
    data = load(folder, validation=3)
    assert sorted(joined(data.evaluation["val"])[1].tolist()) == [0, 1, 2]
    assert data.train.steps_per_epoch == 11 // 4


def test_folders_of_images_are_read_too(tmp_path):
    write_folder(tmp_path / "train", TRAIN, SIDE)
    write_folder(tmp_path / "validation", TEST, SIDE)
    data = load(tmp_path)
    assert sorted(joined(data.evaluation["test"])[1].tolist()) == sorted(k % 3 for k in TEST)
    assert data.train.steps_per_epoch == 3


def test_a_batch_larger_than_the_set_is_reported(folder):
    with refused("batch_size", 15, "1 to 14"):
        load(folder, batch_size=15)


@pytest.mark.parametrize(
    "options",
    [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}],
    ids=["usual", "full colour", "progressive", "grey", "cmyk"],
)
def test_jpegs_have_the_pixels_that_pil_gives_them(tmp_path, options):
    file = tmp_path / "a/picture.jpg"
    file.parent.mkdir()
    smooth = Image.fromarray(sample_image(1, 9)).resize((61, 47), Image.BICUBIC)
    smooth.convert(options.pop("mode", "RGB")).save(file, **options)
    got = decode.pixels(Files([file], ["a"]), 0, 3).permute(1, 2, 0)
    assert np.array_equal(got, np.array(Image.open(file).convert("RGB")))
    file.write_bytes(file.read_bytes()[:-300])
    with refused(str(file)):
        decode.pixels(Files([file], ["a"]), 0, 3)


@pytest.mark.parametrize("shape", [(60, 80), (300, 20), (20, 300)], ids=["usual", "tall", "wide"])
def test_crops_are_distributed_as_torchvisions(shape):
    source, draw = torch.Generator().manual_seed(0), v2.RandomResizedCrop(8)
    ours = torch.tensor([random_box(*shape, source) for _ in range(4000)]).double()
    torch.manual_seed(0)
    keys = ("top", "left", "height", "width")
    given = [draw.make_params([torch.empty(3, *shape)]) for _ in range(4000)]
    theirs = torch.tensor([[params[key] for key in keys] for params in given]).double()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor(shape)).all()
    for one, other in zip(ours.T, theirs.T, strict=True):
        step = (one.sort().values - other.sort().values).abs().mean()  # the distance between the distributions
        assert step < 0.05 * max(other.std(), 1.0)


def test_workers_live_from_epoch_to_epoch_and_serve_every_split(folder):
    data = load(folder, workers=2, validation=3)
    workers = set()
    for epoch in range(2):
        joined(data.train.epoch(epoch))
        joined(data.evaluation["val"])
        joined(data.evaluation["test"])
        workers |= {worker.pid for worker in data.train._pool._loader._iterator._workers}
    assert len(workers) == 2
    begun = iter(data.train.epoch(2))
    next(begun)
    assert same(joined(data.evaluation["test"]), joined(load(folder).evaluation["test"]))
    with pytest.raises(RuntimeError):
        next(begun)
    assert same(joined(data.train.epoch(2)), joined(load(folder, validation=3).train.epoch(2)))


def test_a_rank_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores() == 1


def test_the_last_batch_may_be_kept(folder):
    source = load(folder, drop_last=False).train
    assert source.steps_per_epoch == 4 and source.samples(3) == 2
    assert len(joined(source.epoch(0))[1]) == 14


def test_what_a_streamed_set_cannot_do_is_reported(folder):
    with refused("data.resize", 16, "null"):
        load(folder, resize=16)


def test_workers_without_room_in_shared_memory_are_reported(tmp_path):
    """pytorch 5040: a container has 64 MB of /dev/shm. The queue's thread printed its error, and the parent waited for
    ever."""
    write_parquet(tmp_path / "set/train.parquet", range(64), "image", "label", size=64)
    write_parquet(tmp_path / "set/validation.parquet", range(6), "image", "label", size=64)
    code = f"""from koala.data import Loading, build
from koala.errors import ConfigError
cfg = {CFG | {"path": str(tmp_path / "set"), "workers": 2, "size": 64}!r}
try:
    list(build(cfg, Loading(1, 64, data_root={str(tmp_path / "cache")!r})).train.epoch(0))
except ConfigError as error:
    print(error.key, error.value)"""
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", small, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount a small /dev/shm here: {done.stderr.strip()}")
    assert done.stdout.split() == ["data.workers", "2"], done.stderr
