"""A rank that hangs in its own work: the others give up after `timeout` and say which rank it is, and where."""

import re
import signal
import time

import pytest

from koala import records
from koala.runs import compose, identify, run_dir
from koala.runs.on_rank import run
from koala.training.step import Step
from koala.training.workers import start
from tests.faults.conftest import SMALL

pytestmark = [pytest.mark.extended, pytest.mark.dist]


def fall_asleep():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torch's agent waits half a minute before it kills the sleeper
    time.sleep(1000)


def hanging_run(cfg, *arguments):
    """A run whose rank 1 sleeps in its eighth step."""
    step_on = Step.__call__

    def hanging(self, batch, count, number):
        if number == 7 and self.ranks.rank == 1:
            fall_asleep()
        return step_on(self, batch, count, number)

    Step.__call__ = hanging
    return run(cfg, *arguments)


def test_hung_rank_is_named_with_its_place(folders):
    cfg = compose([*SMALL, "cpu_procs=2", "timeout=8", *folders])
    with pytest.raises(RuntimeError):
        start(cfg, hanging_run, identify(cfg), None)
    error = records.read_record(run_dir(cfg))["error"]
    assert "rank 1" in error and "rank 0" not in error
    assert re.search(r"tests/faults/test_hung_rank.py:\d+ fall_asleep", error)
