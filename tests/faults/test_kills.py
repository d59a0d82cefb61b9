"""SIGKILL, which nothing can catch: the run goes on from its last checkpoint and ends with the same bits as ever."""

import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from koala import records
from koala.runs import compose, identify
from koala.runs.on_rank import run
from koala.training.ranks import join
from koala.training.step import Step
from koala.training.workers import start
from tests.conftest import CONTEXT
from tests.faults.conftest import SMALL, live
from tests.training.conftest import same_bits

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
    for target in sorted(moments.sample(range(1, STEPS - 10), kills)):
        life = killed.start()
        while killed.step() < target and life.is_alive():
            time.sleep(0.001)
        life.join(moments.uniform(0, 0.01))
        assert life.is_alive(), f"ended before it could be killed: {killed.log.read_text()[-2000:]}"
        life.kill()
        life.join()
    killed.finish()
    assert len(killed.lives()) > kills / 2  # the others were killed while they started
    assert same_bits(killed.result(), straight.result())


class Doom:
    """Kills one of a run's ranks, or the parent of the ranks (-1), ``delay`` seconds after it began step ``step``."""

    def __init__(self, whom: int, step: int, delay: float):
        self.whom, self.step, self.delay = whom, step, delay

    def launch(self, cfg) -> dict:
        """As ``koala.training.launch``; the workers are told through the environment."""
        os.environ["KOALA_TEST_DOOM"] = json.dumps([self.whom, self.step, self.delay])
        return start(cfg, doomed_run, identify(cfg), None)


def doomed_run(cfg, *arguments):
    """A run that never ends by itself: at its last step it waits to be killed."""
    whom, step, delay = json.loads(os.environ["KOALA_TEST_DOOM"])
    step_on = Step.__call__
    timer = threading.Timer(delay, lambda: os.kill(os.getppid() if whom < 0 else os.getpid(), signal.SIGKILL))

    def doomed(self, batch, count, number):
        # The run may have been resumed after `step`: the one before was killed some steps late.
        if number >= step and self.ranks.rank == max(0, whom) and timer.ident is None:
            timer.start()
        if number == STEPS - 1:
            threading.Event().wait()
        return step_on(self, batch, count, number)

    Step.__call__ = doomed
    return run(cfg, *arguments)


TWO_RANKS = ["optim=koala-m", "cpu_procs=2", "epochs=3", "log_every=1"]
BATCH_NORM = ["model=resnet18", "model.width=4", "model.layers=[1,1,1,1]"]
BESIDE = ["strategy=fsdp", "checkpoint_async=true"]  # the next save waits for the last: at most one is not there yet


@pytest.mark.extended
@pytest.mark.dist
@pytest.mark.parametrize(
    "whom, overrides",
    [(1, []), (0, ["strategy=fsdp", *BATCH_NORM]), (1, BESIDE)],
    ids=["ddp", "fsdp, BatchNorm", "fsdp, written beside training"],
)
def test_killed_rank_takes_the_others_with_it_and_the_end_is_bit_identical(victim, whom, overrides):
    straight = victim(*TWO_RANKS, *overrides, name="straight")
    straight.finish(2)
    killed = victim(*TWO_RANKS, *overrides, "checkpoint_every=0", name="killed")
    ranks = killed.start_ranks(2, Doom(whom, 30, 0.01).launch)
    for rank in ranks:
        rank.join(120)
    assert ranks[whom].exitcode == -signal.SIGKILL and ranks[1 - whom].exitcode not in (0, None)
    assert killed.step() >= (29 if overrides is BESIDE else 30)
    killed.finish(2)
    assert len(killed.lives()) == 2
    assert same_bits(killed.result(), straight.result())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "overrides", [[], ["strategy=fsdp"], BESIDE], ids=["ddp", "fsdp", "fsdp, written beside training"]
)
def test_any_rank_or_their_parent_killed_at_random_ends_bit_identical(victim, overrides):
    """A killed rank takes the others with it, a killed parent its ranks; what is left can be gone on with at once."""
    straight = victim(*TWO_RANKS, *overrides, name="straight")
    straight.finish()
    killed = victim(*TWO_RANKS, *overrides, "checkpoint_every=0", name="killed")
    moments = random.Random(5)
    targets = sorted(moments.sample(range(1, STEPS - 2), 15))
    for number, target in enumerate(targets):
        life = killed.start(Doom(number % 3 - 1, target, moments.uniform(0, 0.05)).launch)
        life.join(120)
        assert life.exitcode not in (0, None), killed.log.read_text()[-2000:]
        assert killed.step() >= (target - 1 if overrides is BESIDE else target)
    killed.finish()
    assert len(killed.lives()) > len(targets) / 2  # the others were killed before they had saved a step of theirs
    assert same_bits(killed.result(), straight.result())


def joined(environment: dict[str, str], answers) -> None:
    """A rank that joins the others, says what they add up to, and waits to be killed."""
    os.environ.update(environment)
    answers.put(int(join(compose([*SMALL, "timeout=20"])).sum(torch.ones(()))))
    threading.Event().wait()


@pytest.mark.extended
@pytest.mark.dist
def test_ranks_that_are_started_again_find_each_other():
    """Eleven lives of two ranks at one store, which an elastic agent keeps from life to life."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
             "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    for _ in range(11):
        answers = CONTEXT.SimpleQueue()
        ranks = [CONTEXT.Process(target=joined, args=(shared | {"RANK": str(rank)}, answers)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        while answers.empty() and all(rank.is_alive() for rank in ranks):
            ranks[0].join(0.01)
        assert not answers.empty() and (answers.get(), answers.get()) == (2, 2)
        for rank in ranks:
            rank.kill()
            rank.join()


def workers(life) -> list[int]:
    """Process ids of the ranks that a run's parent has started."""
    children = Path(f"/proc/{life.pid}/task/{life.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.extended
@pytest.mark.dist
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_ranks_are_started_again_when_allowed(victim, kills):
    """max_restarts: the agent starts all ranks again from the checkpoint, and nobody has to do anything."""
    run = victim(*TWO_RANKS, "checkpoint_every=0", f"max_restarts={kills}")
    life = run.start()
    for target in range(5, STEPS, STEPS // kills)[:kills]:
        while run.step() < target and life.is_alive():
            time.sleep(0.001)
        os.kill(workers(life)[target % 2], signal.SIGKILL)
    life.join(240)
    assert life.exitcode == 0, run.log.read_text()[-3000:]
    assert len(run.lives()) == kills + 1
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


@pytest.mark.extended
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
