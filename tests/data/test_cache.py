"""The cache of decoded data: whole or made again, shared under the umask, and one message when it cannot be."""

import os
import random
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from koala.data.cache import Kept, cached
from tests.refused import refused

CONTENT = Kept(
    {"images": torch.arange(600, dtype=torch.uint8).view(10, 60), "labels": torch.arange(10)}, {"words": "ä b"}
)


def made():
    return CONTENT


def unmade():
    pytest.fail("made again")


def same(kept):
    tensors = kept.tensors
    equal = all(torch.equal(tensors[name], tensor) for name, tensor in CONTENT.tensors.items())
    return equal and tensors.keys() == CONTENT.tensors.keys() and kept.notes["words"] == CONTENT.notes["words"]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "data/set.safetensors"
    assert same(cached(file, made)) and same(cached(file, unmade))
    return file


def test_no_flipped_bit_is_read_as_data(file, caplog):
    """Any bit of 60, spread over header, tensors and notes; a flip in padding may be harmless, and is found too."""
    full, draw = file.read_bytes(), random.Random(0)
    for folder in [*range(8), *(draw.randrange(len(full)) for _ in range(52))]:
        flipped = bytearray(full)
        flipped[folder] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        assert same(cached(file, made))
        assert same(cached(file, unmade))
    reported = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(reported) >= 50 and all(str(file) in record.message for record in reported)


DAMAGE = {
    "cut": lambda content: content[:-40],
    "empty": lambda content: b"",
    "foreign": lambda content: b"x" * 500,
    "somebody else's safetensors": lambda content: save({"images": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_foreign_file_is_replaced_with_one_line(file, damage, caplog):
    file.write_bytes(damage(file.read_bytes()))
    assert same(cached(file, made))
    (reported,) = caplog.records
    assert str(file) in reported.message and "\n" not in reported.message
    assert same(cached(file, unmade))


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        cached(tmp_path / "data/set.safetensors", made)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "data/set.safetensors").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_whole_file_is_read_where_nothing_can_be_written(file):
    file.parent.chmod(0o500)
    assert same(cached(file, unmade))


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from koala.data.cache import Kept, cached
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
cached(Path(sys.argv[1]), lambda: Kept({"x": torch.zeros(100_000)}, {}))
"""


def test_a_full_disk_is_one_message_and_leaves_nothing(root, tmp_path):
    """A limit on the size of files stands for the disk's end: the system refuses the write in the same place."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "data/set.safetensors")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and last.startswith(f"koala.errors.ConfigError: data_root={tmp_path}/data: ")
    assert not [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"]


def test_a_folder_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    with refused("data_root", tmp_path / "data"):
        cached(tmp_path / "data/set.safetensors", made)
