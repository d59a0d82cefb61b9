"""The one lock of the suite: a file that one process holds, on every file system."""

import os
import signal
import sys
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

LEASE = 20.0  # seconds without a sign of life after which a holder counts as gone


class Lock:
    """A lock file, held by the open file (flock), so that it goes with the process however that ends.

    File systems without flock (some Lustre, NFS and FUSE mounts) get a lease instead: a marker that its holder touches
    every few seconds. What a process left behind that was killed, on whatever node, is taken over once it has not been
    touched for ``LEASE`` seconds. A holder whose lease was taken over asks itself to stop, with SIGTERM.

    Raises, on ``acquire``:
        filelock.Timeout: somebody else holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path, fallback_to_soft=False)

    def acquire(self, wait: bool = True) -> None:
        """Takes the lock; unless it is to ``wait``, at once or, of a lease, as soon as its holder is known to live."""
        try:
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise
        except OSError:  # of flock, or of the file itself, which the marker then shows as well
            marker = self.path.with_name(f"{self.path.name}.lease")
            self._lock = SoftFileLease(marker, lease_duration=LEASE, on_compromise=_stop)
            if not wait and marker.exists():
                print(f"{marker}: waiting to see if its process is alive, at most {2 * LEASE:g} s", file=sys.stderr)
            self._lock.acquire(timeout=-1 if wait else 2 * LEASE)

    def release(self) -> None:
        """Lets others have it."""
        self._lock.release()

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()


def _stop(loss) -> None:
    print(f"{loss.lock_file}: the lease was lost ({loss.reason}); another process may go on with this", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
