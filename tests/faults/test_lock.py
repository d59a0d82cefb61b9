"""The suite's lock on file systems with and without flock, also after its holder was killed on another node."""

import fcntl
import os
import signal
import subprocess
import sys

import filelock
import pytest

from koala import lock
from koala.lock import Lock

LEASE = 3.0
HOLDER = """
import fcntl, pathlib, platform, socket, sys, time
from koala import lock
def flock(*_):
    raise OSError(38, "Function not implemented")
fcntl.flock, lock.LEASE = flock, float(sys.argv[2])
socket.gethostname = platform.node = lambda: sys.argv[3]
held = lock.Lock(pathlib.Path(sys.argv[1]))
held.acquire()
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def without_flock(monkeypatch):
    """``without_flock(errno)``: flock fails, as it does on Lustre without -o flock, NFS without lockd, some FUSE."""

    def fail(errno):
        def flock(*_):
            raise OSError(errno, os.strerror(errno))

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(lock, "LEASE", LEASE)

    return fail


def held_elsewhere(path, node):
    """A process that holds the lock on the node of this name."""
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(path), str(LEASE), node]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_one_holder_at_a_time(tmp_path):
    with Lock(tmp_path / ".lock"):
        with pytest.raises(filelock.Timeout):
            Lock(tmp_path / ".lock").acquire(wait=False)
    Lock(tmp_path / ".lock").acquire(wait=False)


@pytest.mark.parametrize("errno", [37, 38, 95, 5], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EIO"])
def test_a_file_system_without_flock_has_a_lock_too(tmp_path, without_flock, errno):
    without_flock(errno)
    for _ in range(2):  # released, it can be taken again at once
        with Lock(tmp_path / ".lock"):
            pass


@pytest.mark.extended
def test_a_living_holder_on_another_node_keeps_it(tmp_path, without_flock):
    without_flock(38)
    holder = held_elsewhere(tmp_path / ".lock", "another-node")
    try:
        with pytest.raises(filelock.Timeout):
            Lock(tmp_path / ".lock").acquire(wait=False)
    finally:
        holder.kill()


@pytest.mark.extended
@pytest.mark.parametrize("node", ["another-node", os.uname().nodename])
@pytest.mark.parametrize("wait", [True, False])
def test_what_a_killed_holder_left_is_taken_over(tmp_path, without_flock, node, wait):
    without_flock(38)
    holder = held_elsewhere(tmp_path / ".lock", node)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    Lock(tmp_path / ".lock").acquire(wait=wait)


def test_a_folder_that_cannot_be_written_is_the_systems_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Lock(tmp_path / "file" / ".lock").acquire(wait=False)
