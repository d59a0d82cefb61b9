"""When ranks time out while waiting for another: which one it was, and what it was executing."""

import os
import sys
import threading
import traceback
from pathlib import Path

import torch.distributed as dist

from koala.training.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
REQUEST = "koala/report"  # key of the store: a rank has timed out and wants the others' traces
SECONDS = 3.0  # that the others are given to answer, or to time out too


class RankReport:
    """A thread on every rank that tells the others, on request, what this rank's main thread is executing.

    A rank whose collective timed out (after `timeout` seconds) requests it. The hung rank gets no error: it is the one
    that has not requested anything, and its thread answers for it (unless the process is stopped or gone).
    """

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout = ranks, timeout
        self.requested = False  # by this rank
        self.ended = threading.Event()

    def __enter__(self) -> "RankReport":
        self.store = dist.PrefixStore("rank-report", dist.distributed_c10d._get_default_store())
        self.main_thread = threading.get_ident()
        threading.Thread(target=self._answer, name="rank-report", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        # The first rank to give up may take the connections of the others with it, so they may see another error.
        timed_out = isinstance(error, RuntimeError) and ("Timed out" in str(error) or self.store.check([REQUEST]))
        if not timed_out:
            self.ended.set()
            return
        self.requested = True
        report = self._collect()
        self.ended.set()
        raise TimeoutError(report) from error

    def _answer(self) -> None:
        # A poll a second: a wait would hold the connection that collectives may need.
        while not self.ended.wait(1.0):
            if self.store.check([REQUEST]):
                if not self.requested:
                    self.store.set(f"{REQUEST}/{self.ranks.rank}", self._trace())
                if not self.ended.wait(10 * SECONDS):
                    os._exit(1)  # hung still, and the others are gone: do not keep the device
                return

    def _trace(self) -> str:
        """The innermost frames of the main thread: file, line and function."""
        frames = traceback.extract_stack(sys._current_frames()[self.main_thread])[-4:]
        return " < ".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames))

    def _collect(self) -> str:
        self.store.set(f"{REQUEST}/{self.ranks.rank}", "")  # this rank timed out and is not the hung one
        self.store.set(REQUEST, "")
        self.ended.wait(SECONDS)
        hung = []
        for rank in range(self.ranks.world):
            key = f"{REQUEST}/{rank}"
            trace = self.store.get(key).decode() if self.store.check([key]) else "an unknown line: it does not answer"
            if trace:
                hung.append(f"rank {rank}, which is at {trace}")
        return f"ranks waited {self.timeout:g} s in vain for {' and '.join(hung) or 'one that has answered since'}"


def _short(filename: str) -> str:
    """The file's path from the repository's root, or its last parts."""
    path = Path(filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-2:])
