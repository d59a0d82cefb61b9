"""SIGKILL, which nothing can catch: the run goes on from its last checkpoint and ends with the same bits as ever."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from koala import records
from tests.faults.conftest import CONTEXT, live, same_bits

# A checkpoint at every step: what is killed is a run that writes one most of the time.
EVERY_STEP = ["epochs=3", "checkpoint_every=0", "log_every=1"]
STEPS = 3 * 19


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_killed_at_random_moments_ends_bit_identical(victim, kills):
    """Each kill comes a random time after a random step has been saved: in a step, an evaluation or a writing."""
    straight = victim("optim=koala-m", "epochs=3", "log_every=1", name="straight")
    straight.finish()
    killed = victim("optim=koala-m", *EVERY_STEP, name="killed")
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
    assert killed.log.read_text().count("resumed at step") > kills / 2  # the others were killed while they started
    assert same_bits(killed.result(), straight.result())


def workers(life) -> list[int]:
    """Process ids of the ranks that a run's parent has started."""
    children = Path(f"/proc/{life.pid}/task/{life.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.dist
@pytest.mark.slow  # one of ten kills ended with other last bits in P, before CPU ranks gave up bucket views
@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.timeout(1500))])
def test_any_rank_or_their_parent_killed_ends_bit_identical(victim, rounds):
    """A killed rank takes the others with it, a killed parent its ranks; what is left can be gone on with at once."""
    two_ranks = ["optim=koala-m", "cpu_procs=2", "epochs=3", "log_every=1"]
    straight = victim(*two_ranks, name="straight")
    straight.finish()
    killed = victim(*two_ranks, "checkpoint_every=0", name="killed")
    targets = sorted(random.Random(rounds).sample(range(1, STEPS - 5), 3 * rounds))
    for number, target in enumerate(targets):
        life = killed.start()
        while killed.step() < target and life.is_alive():
            time.sleep(0.001)
        ranks = workers(life)
        assert len(ranks) == 2, killed.log.read_text()[-2000:]
        os.kill([life.pid, *ranks][number % 3], signal.SIGKILL)
        life.join(60)
        assert life.exitcode not in (0, None)
    killed.finish()
    assert killed.log.read_text().count("resumed at step") == len(targets)
    assert same_bits(killed.result(), straight.result())


@pytest.mark.slow  # the new ranks do not always find each other on a loaded machine (docs/clusters.md)
@pytest.mark.dist
def test_a_killed_rank_is_started_again_when_allowed(victim):
    """max_restarts=1: the agent starts all ranks again from the checkpoint, and nobody has to do anything."""
    run = victim("optim=koala-m", "cpu_procs=2", "epochs=3", "log_every=1", "checkpoint_every=0", "max_restarts=1")
    life = run.start()
    while run.step() < 20 and life.is_alive():
        time.sleep(0.001)
    os.kill(workers(life)[1], signal.SIGKILL)
    life.join(120)
    assert life.exitcode == 0, run.log.read_text()[-3000:]
    assert "resumed at step" in run.log.read_text()
    assert records.read_record(run.folder)["steps"] == STEPS


def dying_live(overrides, log, function: str) -> None:
    """A life that is killed in the middle of writing a checkpoint, at its fifth call of ``os.<function>``."""
    original, calls = getattr(os, function), itertools.count(1)

    def deadly(*args, **kwargs):
        if "step-" in str(args[0]) or function == "fsync":
            if next(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, function, deadly)
    live(overrides, log)


def test_killed_at_each_stage_of_writing_a_checkpoint(victim):
    """Written but not flushed; flushed but not renamed; renamed but older ones not dropped."""
    straight = victim("optim=koala-m", "epochs=3", "log_every=1", name="straight")
    straight.finish()
    killed = victim("optim=koala-m", *EVERY_STEP, name="killed")
    for function, saved in (("fsync", 4), ("replace", 8), ("unlink", 9)):
        life = CONTEXT.Process(target=dying_live, args=(killed.overrides, killed.log, function))
        life.start()
        life.join(120)
        assert life.exitcode == -signal.SIGKILL, killed.log.read_text()[-2000:]
        assert killed.step() >= saved
    killed.finish()
    assert not list((killed.folder / "checkpoints").glob(".*")), "what was half written is cleared away"
    assert same_bits(killed.result(), straight.result())
