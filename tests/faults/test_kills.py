"""SIGKILL, which nothing can catch: the run goes on from its last checkpoint and ends with the bits of an undisturbed one."""

import random
import time

import pytest

from tests.faults.conftest import same_bits

# A checkpoint at every step: what is killed is a run that writes one most of the time.
EVERY_STEP = ["epochs=3", "checkpoint_every=0", "log_every=1"]
STEPS = 3 * 19


@pytest.mark.parametrize("optim", ["koala-m"])
@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_bit_identical(victim, optim, kills):
    """Each kill comes a random time after a random step has been saved: in a step, an evaluation or a writing."""
    straight = victim(f"optim={optim}", "epochs=3", "log_every=1", name="straight")
    straight.finish()
    killed = victim(f"optim={optim}", *EVERY_STEP, name="killed")
    moments = random.Random(kills)
    for target in sorted(moments.sample(range(1, STEPS - 1), kills)):
        life = killed.start()
        while killed.step() < target and life.is_alive():
            time.sleep(0.001)
        life.join(moments.uniform(0, 0.01))
        assert life.is_alive(), f"ended before it could be killed: {killed.log.read_text()[-2000:]}"
        life.kill()
        life.join()
    killed.finish()
    assert killed.log.read_text().count("resumed at step") >= kills
    assert same_bits(killed.result(), straight.result())
