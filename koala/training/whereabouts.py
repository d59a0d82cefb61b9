"""When ranks wait in vain for another, who is it, and where is it?"""

import os
import sys
import threading
import traceback
from pathlib import Path

import torch.distributed as dist

from koala.training.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "koala/where"
PATIENCE = 3.0  # seconds that the others are given to answer, or to give up waiting too


class Whereabouts:
    """A thread on every rank that tells the others, when one of them asks, where this rank's main thread is.

    A rank that waited in vain in a collective gets an error after `timeout` seconds, and asks. The hung rank gets none:
    it is known by not having asked, and its thread answers for it (unless the process is stopped or gone).
    """

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout = ranks, timeout
        self.asked = False
        self.ended = threading.Event()

    def __enter__(self) -> "Whereabouts":
        if self.ranks.world > 1:
            self.store = dist.PrefixStore("whereabouts", dist.distributed_c10d._get_default_store())
            self.main = threading.get_ident()
            threading.Thread(target=self._answer, name="whereabouts", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.ranks.world == 1:
            return
        # The first rank to give up may take the connections of the others with it, so they may see another error.
        in_vain = isinstance(error, RuntimeError) and ("Timed out" in str(error) or self.store.check([QUESTION]))
        if not in_vain:
            self.ended.set()
            return
        self.asked = True
        explanation = self._ask()
        self.ended.set()
        raise TimeoutError(explanation) from error

    def _answer(self) -> None:
        # A poll a second: a wait would hold the connection that collectives may need.
        while not self.ended.wait(1.0):
            if self.store.check([QUESTION]):
                if not self.asked:
                    self.store.set(f"{QUESTION}/{self.ranks.rank}", self._place())
                if not self.ended.wait(10 * PATIENCE):
                    os._exit(1)  # hung still, and the others are gone: do not keep the device
                return

    def _place(self) -> str:
        """The innermost frames of the main thread: file, line and function."""
        frames = traceback.extract_stack(sys._current_frames()[self.main])[-4:]
        return " < ".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames))

    def _ask(self) -> str:
        self.store.set(f"{QUESTION}/{self.ranks.rank}", "")  # this rank waited
        self.store.set(QUESTION, "")
        self.ended.wait(PATIENCE)
        hung = []
        for rank in range(self.ranks.world):
            key = f"{QUESTION}/{rank}"
            place = self.store.get(key).decode() if self.store.check([key]) else "an unknown place: it does not answer"
            if place:
                hung.append(f"rank {rank}, which is at {place}")
        return f"ranks waited {self.timeout:g} s in vain for {' and '.join(hung) or 'one that has answered since'}"


def _short(filename: str) -> str:
    """The file's path from the repository's root, or its last parts."""
    path = Path(filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-2:])
