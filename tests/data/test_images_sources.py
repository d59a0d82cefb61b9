"""Image sets from files: parquet, folders, the cache, and what is refused."""

import multiprocessing
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from koala.data import Loading, build
from tests.data.image_sets import CFG, cache_of, load, png, sample_image, sample_images, write_folder, write_parquet
from tests.refused import refused


def test_parquet_files_are_decoded_exactly(folder, tmp_path):
    data = load(folder, tmp_path)
    assert torch.equal(data.train.inputs, sample_images(range(24)))
    assert data.train.labels.tolist() == [k % 3 for k in range(24)]
    assert torch.equal(data.evaluation["test"].inputs, sample_images(range(100, 107)))
    assert set(data.evaluation) == {"test"}


def test_decoding_writes_nothing_to_standard_output_and_no_escape_codes_to_a_file(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    load(folder, tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and "tiny train" in err and "\x1b" not in err


def test_validation_is_carved_from_train(folder, tmp_path):
    data = load(folder, tmp_path, validation=6)
    assert data.evaluation["val"].labels.bincount().tolist() == [2, 2, 2]
    both = torch.cat([data.train.inputs, data.evaluation["val"].inputs]).flatten(1)
    assert len(both.unique(dim=0)) == 24


def test_folders_of_images_have_their_classes_in_alphabetical_order(tmp_path):
    write_folder(tmp_path / "set/train", range(6))
    write_folder(tmp_path / "set/test", range(6, 9))
    data = load(tmp_path / "set", tmp_path, image_column="image", label_column="label")
    labelled = zip(data.train.inputs, data.train.labels, strict=True)
    result = {image.sum().item(): label.item() for image, label in labelled}
    assert result == {int(sample_image(k).sum()): k % 3 for k in range(6)}
    assert data.evaluation["test"].count == 3


def test_grey_images_have_one_channel(folder, tmp_path):
    image = load(folder, tmp_path, channels=1).train.inputs[0, 0]
    assert torch.equal(image, torch.from_numpy(np.array(Image.fromarray(sample_image(0)).convert("L"))))


def test_the_second_time_comes_from_the_cache_without_reading_the_files(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path)
    monkeypatch.setattr("koala.data.decode.encoded", lambda *_: pytest.fail("the files were read again"))
    second = load(folder, tmp_path)
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert len(cache_of(tmp_path)) == 1


def test_another_split_is_not_taken_from_the_cache_of_this_one(folder, tmp_path):
    load(folder, tmp_path)
    assert torch.equal(load(folder, tmp_path, train_split="test").train.inputs, sample_images(range(100, 107)))


def test_a_changed_file_is_decoded_again(folder, tmp_path):
    load(folder, tmp_path)
    write_parquet(folder / "deeper/test-00000-of-00001.parquet", range(200, 203))
    assert torch.equal(load(folder, tmp_path).evaluation["test"].inputs, sample_images(range(200, 203)))


def _load_and_count(folder, tmp_path, barrier, counts):
    import koala.data.decode as decode

    original, calls = decode.encoded, []
    decode.encoded = lambda *arguments: calls.append(1) or original(*arguments)
    barrier.wait()
    data = load(folder, tmp_path)
    counts.put((len(calls), int(data.train.inputs.sum())))


@pytest.mark.dist
def test_two_processes_at_once_decode_once(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(2), context.Queue()
    arguments = (folder, tmp_path, barrier, counts)
    processes = [context.Process(target=_load_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(calls for calls, _ in seen) == [0, 1]
    assert {total for _, total in seen} == {int(sample_images(range(24)).long().sum())}


def test_a_partial_file_left_by_a_killed_run_does_no_harm(folder, tmp_path):
    load(folder, tmp_path)
    (file,) = cache_of(tmp_path)
    file.rename(file.with_suffix(".partial"))
    load(folder, tmp_path)
    assert cache_of(tmp_path) == [file] and not file.with_suffix(".partial").exists()


def test_a_missing_folder_is_named(tmp_path):
    with refused("data.path", str(tmp_path / "nowhere")):
        load(tmp_path / "nowhere", tmp_path)


def test_an_empty_folder_says_what_is_wanted(tmp_path):
    with refused("data.path", str(tmp_path)) as caught:
        load(tmp_path, tmp_path)
    assert "train*.parquet" in caught.value.valid and "img, fine_label" in caught.value.valid


def test_a_folder_without_test_images_is_reported(folder, tmp_path):
    (folder / "deeper/test-00000-of-00001.parquet").unlink()
    with refused("data.path", str(folder), mentions="test"):
        load(folder, tmp_path)


def test_other_columns_are_named_with_those_wanted(folder, tmp_path):
    write_parquet(folder / "train-00001-of-00002.parquet", range(3), "picture", "class")
    with refused("data.image_column", "img", ("class", "extra", "picture"), mentions="train-00001"):
        load(folder, tmp_path)


@pytest.mark.parametrize("damage", ["footer", "header of a page"])
def test_a_damaged_parquet_file_is_named(folder, tmp_path, damage):
    file = folder / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-100] if damage == "footer" else b"PAR1" + b"\xff" * 200 + content[204:])
    with refused("data.path", str(folder), mentions="train-00001"):
        load(folder, tmp_path)
    assert not cache_of(tmp_path)


def test_images_of_another_size_are_reported(folder, tmp_path):
    with refused("data.size", 32, mentions="5x5"):
        load(folder, tmp_path, size=32)


def test_without_the_hub_the_message_offers_a_local_copy(tmp_path):
    # conftest.py switches the hub off, as a machine without network would find it
    with refused("data.hub", "uoft-cs/none-such") as caught:
        load(None, tmp_path, hub="uoft-cs/none-such")
    assert "data.path=" in caught.value.valid and "img, fine_label" in caught.value.valid


def test_cifar100_is_read_as_its_publishers_describe_it(shared, tmp_path):
    cfg = CFG | {"path": str(shared / "data/cifar100"), "classes": 100, "size": 32, "train_split": "test"}
    data = build(cfg, Loading(1, 128, data_root=tmp_path))  # test alone, to be quick
    assert data.train.labels.bincount().tolist() == [100] * 100
    # (129.3, 124.1, 112.4) and (68.2, 65.4, 70.4), of the papers, are statistics of the training images
    pixels = data.train.inputs.double()
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor([129.3, 124.1, 112.4]).double(), atol=1.0)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor([68.2, 65.4, 70.4]).double(), atol=1.0)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["cat"] * 10, pa.string(), "string"),
        ([0.5] * 10, pa.float64(), "double"),
        ([None, *[1] * 9], pa.int64(), "3 "),
    ],
)
def test_labels_that_are_no_numbers_are_reported(folder, tmp_path, values, kind, message):
    for file in folder.rglob("*.parquet"):
        table = parquet.read_table(file)
        some = (values * 3)[: len(table)] if "train" in file.name else [values[-1]] * len(table)
        parquet.write_table(table.set_column(2, "fine_label", pa.array(some, kind)), file)
    with refused("data.label_column", "fine_label", mentions=message):
        load(folder, tmp_path)


def test_images_that_are_names_of_files_are_reported(folder, tmp_path):
    for file in folder.rglob("*.parquet"):
        table = parquet.read_table(file)
        parquet.write_table(table.set_column(0, "img", pa.array(["/etc/passwd"] * len(table))), file)
    with refused("data.image_column", "img", mentions="string"):
        load(folder, tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_labels_beyond_the_classes_are_reported(folder, tmp_path, cached):
    if cached:
        load(folder, tmp_path)
    with refused("data.classes", 2, mentions="0 to 2"):
        load(folder, tmp_path, classes=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_more_classes_than_the_set_has_are_reported_where_it_says(tmp_path, streaming):
    write_folder(tmp_path / "set/train", range(6))
    write_folder(tmp_path / "set/test", range(6, 8))  # nothing of one class
    data = load(tmp_path / "set", tmp_path, streaming=streaming)
    assert data.num_classes == 3 and data.evaluation["test"].count == 2
    with refused("data.classes", 4, "3"):
        load(tmp_path / "set", tmp_path, classes=4, streaming=streaming)


NUMBERS, WORDS = (lambda n: list(range(n))), (lambda n: [f"x{k}" for k in range(n)])
UNWANTED = {
    "test lacks a column": ({"extra": NUMBERS}, {}),
    "test has one more": ({}, {"extra": NUMBERS}),
    "the same name, another type": ({"extra": NUMBERS}, {"extra": WORDS}),
    "two files of a split differ": ({}, {"extra": WORDS, "of_train": True}),
    "labels of two widths": ({"label": pa.int8()}, {"label": pa.int64(), "of_train": True, "first": 900}),
    "labels with and without a sign": ({"label": pa.int8()}, {"label": pa.uint8(), "of_train": True, "first": 600}),
    "binary and large_binary": ({}, {"binary": pa.large_binary(), "of_train": True}),
    "another order": ({}, {"swap": True}),
}


def write_table(file, numbers, label=None, binary=None, extra=None, swap=False, of_train=False, first=0):
    images = pa.struct([("bytes", binary or pa.binary()), ("path", pa.string())])
    columns = {
        "img": pa.array([{"bytes": png(sample_image(k)), "path": None} for k in numbers], images),
        "fine_label": pa.array([(first + k) % 3 for k in numbers], label or pa.int64()),
    } | ({"id": pa.array(extra(len(numbers)))} if extra else {})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(dict(reversed(columns.items())) if swap else columns), file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", UNWANTED)
def test_only_wanted_columns_are_read(tmp_path, case, streaming):
    """Parquet files whose other columns differ (datasets: "column names don't match")."""
    first, second = UNWANTED[case]
    write_table(tmp_path / "set/train-0.parquet", range(9), **first)
    write_table(tmp_path / "set/train-1.parquet", range(9, 18), **(second if second.get("of_train") else first))
    write_table(tmp_path / "set/test-0.parquet", range(6), **second)
    data = load(tmp_path / "set", tmp_path, streaming=streaming, workers=0)
    assert data.train.steps_per_epoch == 4 and data.evaluation["test"].count == 6
    labels = torch.cat([batch.targets for batch in data.evaluation["test"]])
    assert labels.tolist() == [k % 3 for k in range(6)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_copy_of_the_hub_may_differ_in_unwanted_columns(tmp_path, streaming):
    write_table(tmp_path / "set/data/train-0.parquet", range(9), extra=NUMBERS)
    write_table(tmp_path / "set/data/test-0.parquet", range(6), extra=WORDS)
    data = load(None, tmp_path, hub=str(tmp_path / "set"), streaming=streaming, workers=0)
    assert data.train.steps_per_epoch == 2 and data.evaluation["test"].count == 6
    with refused("data.label_column", "label", ("fine_label", "id", "img")):
        load(None, tmp_path, hub=str(tmp_path / "set"), label_column="label")


@pytest.mark.parametrize("source", ["path", "hub"])
def test_a_file_replaced_under_the_same_size_and_time_is_read_again(tmp_path, source):
    """cp -p, rsync -t: the data sets' library goes by the modification time alone."""
    file = tmp_path / "set/train-0.parquet"
    write_table(file, range(9))
    write_table(tmp_path / "set/test-0.parquet", range(6))
    keys = {source: str(tmp_path / "set"), "streaming": True, "workers": 0}
    before, stat = load(None, tmp_path, **keys), file.stat()
    write_table(file, range(9), first=1)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load(None, tmp_path, **keys)
    labels = [torch.cat([batch.targets for batch in data.train.epoch(0)]) for data in (before, after)]
    assert torch.equal((labels[0] + 1) % 3, labels[1])
