"""A disk that fills up or turns read-only, damaged input, two writers, clocks that jump, permissions of files."""

import contextlib
import errno
import os
import re
import resource
import signal
import stat
import subprocess
import time

import pytest

from koala import records
from koala.runs import compose, launch
from tests.faults.conftest import SMALL
from tests.refused import assert_names
from tests.training.conftest import same_bits

RUN = ["optim=koala-m", "epochs=6", "log_every=1"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def full(folder):
    """No room is left on the folder's disk; what is freed meanwhile is taken as well."""
    filler = folder / "filler"

    def take_all():
        with pytest.raises(OSError) as caught, filler.open("ab") as file:
            while True:
                os.write(file.fileno(), bytes(2**20))
        assert caught.value.errno == errno.ENOSPC

    yield take_all
    filler.unlink()


@contextlib.contextmanager
def read_only(folder):
    """The folder cannot be written, even by root: it is covered by a read-only view of itself."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    end = time.monotonic() + 60
    while subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True).returncode:
        assert time.monotonic() < end  # busy while the run has a file open below it
    yield lambda: None
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("broken, number", [(full, errno.ENOSPC), (read_only, errno.EROFS)])
def test_disk_breaks_in_the_middle_of_a_run(victim, disk, tmp_path, broken, number):
    """One message; what was written before is intact; mended, the same command ends with an undisturbed run's bits."""
    straight = victim(*RUN, name="straight")
    straight.finish()
    run = victim(*RUN, "checkpoint_every=0", name=disk.name)
    run.log = tmp_path / "victim.log"
    life = run.start()
    while run.step() < 20 and life.is_alive():
        time.sleep(0.001)
    with broken(run.folder) as keep_broken:
        while life.is_alive():
            keep_broken()
            life.join(0.01)
    log = run.log.read_text()
    assert life.exitcode == 1 and re.search(rf"^OSError: \[Errno {number}\] .*output_root=", log, re.MULTILINE), log
    assert run.step() >= 20 and records.read_history(run.folder) and records.read_record(run.folder) is None
    run.finish()
    assert len(run.lives()) == 2
    assert same_bits(run.result(), straight.result())


def test_a_limit_on_the_size_of_files_is_as_a_disk_that_is_full(victim):
    """`ulimit -f`, or a file system's own largest file."""
    straight = victim(*RUN, name="straight")
    straight.finish()
    run = victim(*RUN, "checkpoint_every=0")
    life = run.start()
    while run.step() < 20 and life.is_alive():
        time.sleep(0.001)
    limit = run.checkpoints()[-1].stat().st_size // 2  # the log is shorter
    resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (limit, limit))
    life.join()
    assert life.exitcode == 1 and "output_root" in run.log.read_text()
    assert records.read_record(run.folder) is None
    run.finish()
    assert same_bits(run.result(), straight.result())


def test_disk_that_is_read_only_from_the_start_is_bad_input(disk, run_door):
    with read_only(disk):
        done = run_door("train.py", *SMALL, f"output_root={disk}/outputs")
    assert done.returncode == 2
    assert_names(done.stderr, "output_root")


@pytest.mark.extended
def test_second_process_on_the_same_run_says_so_and_touches_nothing(victim, run_door):
    run = victim(*RUN, "epochs=40", "checkpoint_every=0")
    first = run.start()
    while run.step() < 5 and first.is_alive():
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still there when the second has started, on any machine
    second = run_door("train.py", *run.overrides)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and str(run.folder) in second.stderr, second.stderr
    first.join(120)
    assert first.exitcode == 0 and records.read_record(run.folder)["status"] == "finished"


def test_wall_clock_that_jumps_does_not_break_timings(folders, monkeypatch):
    """Time is set back a day at every second look at the wall clock."""
    looks = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86_400 * (next(looks) % 2))
    began = time.perf_counter()
    record = launch(compose([*SMALL, *RUN, *folders]))
    elapsed = time.perf_counter() - began
    assert 0 < record["seconds"]["train"] < elapsed and 0 < record["seconds"]["eval"] < elapsed
    assert record["throughput"] > 1257 * 6 / elapsed


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=["022", "077"])
def test_files_get_the_permissions_of_the_umask(tmp_path, folders, umask):
    before = os.umask(umask)
    try:
        launch(compose([*SMALL, "max_steps=2", *folders]))
    finally:
        os.umask(before)
    written = list((tmp_path / "outputs").rglob("*"))
    assert any(path.suffix == ".pt" for path in written)
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
