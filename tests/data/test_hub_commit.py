"""Which commit of a data set was read, where the configuration names none: a branch moves on."""

from types import SimpleNamespace

import datasets
import pytest
import torch

from koala.data import tables
from koala.runs import compose, launch
from tests.data.image_sets import load, sample_images, write_parquet

COMMITS = [f"{number:040x}" for number in range(1, 9)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose main branch is another commit at each question, image by image; and the revisions it was read at."""
    moving, read = iter(COMMITS), []

    def builder(revision=None, **_):
        return SimpleNamespace(config=None, hash=next(moving) if revision in (None, "main") else revision)

    def dataset(split, revision=None, **_):
        read.append(revision)
        first = COMMITS.index(revision) * 20 + (0 if split == "train" else 10)
        write_parquet(tmp_path / f"{first}.parquet", range(first, first + 6))
        return datasets.Dataset.from_parquet(str(tmp_path / f"{first}.parquet"), cache_dir=str(tmp_path / "arrow"))

    library = SimpleNamespace(load_dataset_builder=builder, load_dataset=dataset, exceptions=datasets.exceptions)
    monkeypatch.setattr(tables, "_library", lambda: library)
    tables._commit.cache_clear()
    yield read
    tables._commit.cache_clear()


@pytest.mark.parametrize("streaming", [False, True])
def test_all_splits_are_of_one_commit_and_the_data_says_which(hub, tmp_path, streaming):
    data = load(None, tmp_path, hub="some/set", streaming=streaming, workers=0 if streaming else None)
    assert data.commit == COMMITS[0] and set(hub) == {COMMITS[0]}


def test_the_cache_keeps_the_commit_that_it_is_of(hub, tmp_path):
    load(None, tmp_path, hub="some/set")
    tables._commit.cache_clear()  # another process, later: main is elsewhere
    data = load(None, tmp_path, hub="some/set")
    assert data.commit == COMMITS[0] and torch.equal(data.train.inputs, sample_images(range(6)))


def test_the_record_names_the_commit(hub, folders):
    data = ["hub=some/set", "hub_revision=null", "label_column=fine_label", "classes=3", "size=5", "crop_padding=0"]
    run = ["model=mlp", "schedule=constant", "max_steps=1", "batch_size=4", "logger=none", "num_gpus=0"]
    record = launch(compose(["data=cifar10", *(f"data.{key}" for key in data), *run, *folders]))
    assert record["data"] == {"name": "cifar10", "fingerprint": "hub:some/set@main", "revision": COMMITS[0]}


def test_a_local_set_is_of_no_commit(folder, tmp_path):
    assert load(folder, tmp_path).commit is None
