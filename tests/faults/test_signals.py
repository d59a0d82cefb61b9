"""Signals from a person, a terminal and a scheduler: what is said of a checkpoint is so, and one way out is left."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from koala import records
from koala.lock import Lock
from koala.runs import compose, run_dir
from koala.runs.folder import LOCK
from koala.training.evaluation import Evaluation
from koala.training.stop import Stopped
from tests.conftest import CONTEXT
from tests.faults.conftest import live
from tests.training.conftest import same_bits

LONG = ["optim=koala-m", "epochs=2000", "log_every=5", "eval_every=7"]


def wait_until(ready, life, log) -> None:
    end = time.monotonic() + 200
    while not ready():
        alive = life.poll() is None if isinstance(life, subprocess.Popen) else life.is_alive()
        assert alive and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)


def stoppable(overrides, log) -> None:
    """A life that ends as ``train.py`` does when it is stopped."""
    try:
        live(overrides, log)
    except Stopped as stop:
        os.write(2, f"{stop}\n".encode())
        os._exit(128 + stop.signum)


def numbers_said(text: str, signum: int) -> list[int]:
    """The numbers in the last line that names the signal, which is what a person reads of the stop."""
    *_, line = (line for line in text.splitlines() if signal.Signals(signum).name in line)
    return [int(number) for number in re.findall(r"\d+", line)]


def check_what_was_said(run, text: str, signum: int) -> None:
    """The message names the step of a checkpoint that is there, and the newest."""
    assert numbers_said(text, signum) == [run.step()] != [0], text[-3000:]
    assert "Traceback" not in text and records.read_record(run.folder) is None


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_one_process_stops_at_the_next_step(victim, signum):
    run = victim(*LONG)
    life = CONTEXT.Process(target=stoppable, args=(run.overrides, run.log))
    life.start()
    wait_until(lambda: records.read_history(run.folder), life, run.log)
    os.kill(life.pid, signum)
    life.join(60)
    assert life.exitcode == 128 + signum
    check_what_was_said(run, run.log.read_text(), signum)


@pytest.mark.extended
@pytest.mark.dist
@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGHUP])
def test_ranks_stop_with_the_terminal(victim, start_door, signum):
    """A terminal's signals reach the whole group, parent and ranks; the ranks hear of them once, from the parent."""
    run = victim(*LONG, "cpu_procs=2", "num_gpus=0")
    life = start_door("train.py", *run.overrides)
    wait_until(lambda: records.read_history(run.folder), life, life.log)
    os.killpg(life.pid, signum)
    assert life.wait(100) == 128 + signum
    check_what_was_said(run, life.log.read_text(), signum)


@pytest.mark.extended
@pytest.mark.dist
def test_stopped_while_ranks_start_claims_no_checkpoint(victim, start_door):
    run = victim(*LONG, "cpu_procs=2")
    life = start_door("train.py", *run.overrides)
    wait_until(lambda: len(children(life.pid)) >= 2, life, life.log)
    life.send_signal(signal.SIGINT)
    assert life.wait(60) == 128 + signal.SIGINT
    assert numbers_said(life.log.read_text(), signal.SIGINT) == [] == run.checkpoints()


def children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


@pytest.mark.dist
@pytest.mark.extended
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_stop_with_the_agent_that_started_them(victim, root, signum):
    """torchrun expects no USR1 (`sbatch --signal=USR1@120`) and dies of it: its ranks must not train on as orphans."""
    run = victim(*LONG)
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    with open(run.log, "w") as log:
        life = subprocess.Popen([*agent, *run.overrides], cwd=root, stdout=log, stderr=log, start_new_session=True)
    folder = run_dir(compose([*run.overrides, "cpu_procs=2"]))
    wait_until(lambda: records.read_history(folder), life, run.log)
    life.send_signal(signum)
    life.wait(60)
    Lock(folder / LOCK).acquire()  # once the ranks have let it go
    assert any((folder / "checkpoints").glob("step-*")) and records.read_record(folder) is None


def endless_evaluation(overrides, log, began) -> None:
    """A life of a run whose first evaluation does not end by itself: its set is handed out again and again."""
    watched = Evaluation._checked

    def endless(self, batches):
        began.touch()
        while True:
            yield from watched(self, batches)

    Evaluation._checked = endless
    stoppable(overrides, log)


def test_stop_during_evaluation_is_answered_between_two_batches_and_loses_nothing(victim, tmp_path):
    straight = victim("optim=koala-m", "epochs=2", "schedule=plateau", name="straight")
    straight.finish()
    run, began = victim("optim=koala-m", "epochs=2", "schedule=plateau"), tmp_path / "began"
    life = CONTEXT.Process(target=endless_evaluation, args=(run.overrides, run.log, began))
    life.start()
    wait_until(began.exists, life, run.log)
    os.kill(life.pid, signal.SIGTERM)
    life.join(60)
    assert life.exitcode == 128 + signal.SIGTERM
    check_what_was_said(run, run.log.read_text(), signal.SIGTERM)
    run.finish()
    assert same_bits(run.result(), straight.result())


def without_terminal(overrides, log) -> None:
    """A life as ``nohup`` starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    live(overrides, log)


@pytest.mark.extended
def test_nohup_outlives_its_terminal(victim):
    run = victim("optim=koala-m", "epochs=40")
    life = CONTEXT.Process(target=without_terminal, args=(run.overrides, run.log))
    life.start()
    wait_until(lambda: records.read_history(run.folder), life, run.log)
    os.kill(life.pid, signal.SIGHUP)
    life.join(200)
    assert life.exitcode == 0 and records.read_record(run.folder)["status"] == "finished"


TWO = pytest.param("cpu_procs=2", marks=[pytest.mark.dist, pytest.mark.slow])


@pytest.mark.extended
@pytest.mark.parametrize("ranks", ["cpu_procs=1", TWO])
def test_run_goes_on_when_nobody_reads_what_it_says(victim, root, ranks):
    """`train.py 2>&1 | head -n 1`: the reader of both streams is gone after a line."""
    run = victim("optim=koala-m", "epochs=6", "log_every=2", ranks)
    reader, writer = os.pipe()
    life = subprocess.Popen([sys.executable, "train.py", *run.overrides], cwd=root, stdout=writer, stderr=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    assert life.wait(200) == 0 and records.read_record(run.folder)["status"] == "finished"
