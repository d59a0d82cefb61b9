"""Fingerprints: the same for the same content wherever it lies, another one for any change that a run would see."""

import os
import shutil

import pytest
import yaml

from koala.data import fingerprint
from koala.errors import ConfigError
from tests.data.pictures import write_folder, write_parquet

IMAGES = {"kind": "images", "name": "set", "classes": 3, "size": 5, "image_column": "img"}
TEXTS = {"train.txt": "a b c\n", "valid.txt": "a\n", "test.txt": "b\n"}


@pytest.fixture
def of(tmp_path):
    return lambda cfg: fingerprint(cfg, tmp_path / "data")


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in TEXTS.items():
        (folder / name).write_text(content)
    return {"kind": "text", "name": "words", "path": str(folder)}


def moved(cfg, tmp_path):
    shutil.copytree(cfg["path"], tmp_path / "elsewhere")
    return cfg | {"path": str(tmp_path / "elsewhere")}


def test_text_is_known_by_its_content(text, of, tmp_path):
    before = of(text)
    assert before.startswith("sha256:") and of(text | {"bptt": 7}) == before == of(moved(text, tmp_path))
    for name, content in TEXTS.items():
        (tmp_path / "text" / name).write_text(content.replace("a", "x").replace("b", "y"))
        assert of(text) != before  # of the same size
        before = of(text)


def test_pictures_are_known_by_content_split_and_class(of, tmp_path):
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        write_folder(tmp_path / "set" / split, numbers)
    cfg = IMAGES | {"path": str(tmp_path / "set")}
    before = of(cfg)
    assert of(moved(cfg, tmp_path)) == before
    (tmp_path / "set/train/a/0.png").rename(tmp_path / "set/train/b/0.png")
    assert of(cfg) != before


def test_parquet_files_are_known_by_their_bytes(of, tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(tmp_path / f"set/{name}.parquet", range(3))
    cfg = IMAGES | {"path": str(tmp_path / "set")}
    before = of(cfg)
    write_parquet(tmp_path / "set/train-1.parquet", range(1, 4))
    assert of(cfg) != before


def test_files_are_read_once_whoever_asks_and_again_when_one_is_touched(text, of, tmp_path):
    before = of(text)
    train = tmp_path / "text/train.txt"
    stat = train.stat()
    train.write_text(TEXTS["train.txt"].replace("a", "z"))
    os.utime(train, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert of(text) == before  # size and time say that it is the file that was read
    os.utime(train)
    assert of(text) != before


def test_a_damaged_or_unwritable_note_of_a_digest_only_costs_time(text, of, tmp_path):
    before = of(text)
    (note,) = (tmp_path / "data/fingerprints").iterdir()
    note.write_bytes(b"\xff\x00")
    assert of(text) == before == fingerprint(text, note / "not a folder")
    assert of(text) == before


def test_the_hub_is_known_by_its_commit_and_a_copy_of_it_by_content(of, text):
    assert of(IMAGES | {"hub": "some/set", "hub_revision": "c0ffee"}) == "hub:some/set@c0ffee"
    assert of(IMAGES | {"hub": "some/set"}) == "hub:some/set@main"
    copy = {"kind": "text", "name": "words", "hub": text["path"]}
    assert of(copy).startswith("sha256:") and of(copy) != of(text)


def test_embedded_sets_have_fingerprints_of_their_own(root, of):
    digits, pydocs = (yaml.safe_load((root / f"configs/data/{name}.yaml").read_text()) for name in ("digits", "pydocs"))
    assert len({of(digits), of(pydocs)}) == 2 and of(digits) == of(digits | {"size": 8})


def test_missing_files_are_told(of, tmp_path):
    for cfg in (
        {"kind": "text", "name": "t", "path": str(tmp_path / "none")},
        IMAGES | {"path": str(tmp_path / "none")},
    ):
        with pytest.raises(ConfigError, match="data.path=.*none.*no such folder"):
            of(cfg)
    with pytest.raises(ConfigError, match="data.kind='sound'"):
        of({"kind": "sound"})
