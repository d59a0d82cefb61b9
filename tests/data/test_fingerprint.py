"""Fingerprints: the same for the same content wherever it lies, another one for any change that a run would see."""

import os
import shutil
from importlib import import_module

import pytest
import yaml

from koala.data import fingerprint
from tests.data.image_sets import write_folder, write_parquet
from tests.refused import refused

MODULE = import_module("koala.data.fingerprint")  # its name in the package is the function's
IMAGES = {"kind": "images", "name": "set", "classes": 3, "size": 5, "image_column": "img"}
TEXTS = {"train.txt": "a b c\n", "valid.txt": "a\n", "test.txt": "b\n"}


@pytest.fixture
def of(tmp_path):
    return lambda cfg: fingerprint(cfg, tmp_path / "data")


@pytest.fixture
def text(write_text):
    return {"kind": "text", "name": "words", "path": str(write_text(*TEXTS.values()))}


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


def rewrite(file):
    file.write_text(TEXTS["train.txt"].replace("a", "z"))


def replace(file):
    rewrite(new := file.with_suffix(".new"))
    new.replace(file)


@pytest.fixture
def at_rest(monkeypatch):
    monkeypatch.setattr(MODULE, "TIME_STEP", 0.0)


@pytest.mark.parametrize("change", [rewrite, replace])
@pytest.mark.parametrize("rest", [True, False], ids=["later", "at once"])
def test_changed_content_is_noticed_under_the_same_size_and_time(text, of, tmp_path, request, change, rest):
    if rest:
        request.getfixturevalue("at_rest")
    before, train = of(text), tmp_path / "text/train.txt"
    stat = train.stat()
    change(train)
    os.utime(train, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p, rsync and git archive do
    assert of(text) != before


def test_a_moment_old_file_is_not_remembered(text, of, tmp_path):
    """Within one step of the file system's clock it could change once more, and look the same."""
    of(text)
    assert not (tmp_path / "data").exists()


def test_files_are_read_once_whoever_asks(text, of, at_rest, monkeypatch):
    before = of(text)
    monkeypatch.setattr(MODULE, "_of_file", lambda file: pytest.fail("read again"))
    assert of(text) == before


def test_a_damaged_or_unwritable_note_of_a_digest_only_costs_time(text, of, at_rest, tmp_path):
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


def test_files_that_cannot_be_read_are_named(of, tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / "set" / split, range(3))
    before = of(IMAGES | {"path": str(tmp_path / "set")})
    notebook = tmp_path / "set/train/.ipynb_checkpoints/0.png"  # hidden, so no class
    notebook.parent.mkdir()
    notebook.touch()
    assert of(IMAGES | {"path": str(tmp_path / "set")}) == before
    bad = tmp_path / "set/train/a/of_a_camera"
    for make in (bad.mkdir, lambda: bad.symlink_to("nothing")):
        make()
        with refused(str(bad)):
            of(IMAGES | {"path": str(tmp_path / "set")})
        bad.unlink() if bad.is_symlink() else bad.rmdir()


def test_missing_files_are_reported(of, tmp_path):
    for cfg in (
        {"kind": "text", "name": "t", "path": str(tmp_path / "none")},
        IMAGES | {"path": str(tmp_path / "none")},
    ):
        with refused("data.path") as caught:
            of(cfg)
        assert str(caught.value.value) == str(tmp_path / "none")
    with refused("data.kind", "sound", ("images", "sentences", "text")):
        of({"kind": "sound"})
