"""Out of memory for real: the address space of the process is limited. An activation here has 80 MB."""

import re
import resource
from pathlib import Path

import pytest

from tests.conftest import CONTEXT
from tests.faults.conftest import live

pytestmark = pytest.mark.extended

MEGABYTE = 2**20


def confined(overrides, log, room: int) -> None:
    """A life that may take ``room`` bytes more than it has when it begins to train."""
    from koala.training.loop import Trainer

    fit = Trainer.fit

    def confined_fit(trainer):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return fit(trainer)

    Trainer.fit = confined_fit
    live(overrides, log)


def test_message_has_what_fits_and_the_setting_that_works(victim):
    """The setting it names is then followed, in the same room, and trains."""
    big = ["model.layers=[1]", "model.width=20000", "batch_size=1024", "max_steps=1", "optim=sgd"]
    run = victim(*big)
    life = CONTEXT.Process(target=confined, args=(run.overrides, run.log, 100 * MEGABYTE))
    life.start()
    life.join(120)
    printed = re.search(r"ConfigError: batch_size=1024: .* accumulation=(\d+)", run.log.read_text())
    assert life.exitcode == 1 and printed, run.log.read_text()[-2000:]
    assert 1 < int(printed[1]) < 1024
    advised = victim(*big, f"accumulation={printed[1]}", name="advised")
    life = CONTEXT.Process(target=confined, args=(advised.overrides, advised.log, 100 * MEGABYTE))
    life.start()
    life.join(120)
    assert life.exitcode == 0, advised.log.read_text()[-2000:]
