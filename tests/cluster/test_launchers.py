"""What launchers tell the ranks that they start, and what a rank does that was started alone."""

import os
import signal
import socket

import pytest
from omegaconf import OmegaConf

from koala.training import ranks
from koala.training.stop import Stopped, requeue
from tests.cluster.one_node_slurm import free_port
from tests.refused import refused

STEP = {"SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """``environment(**variables)``: of launchers, these and no others; what was set meanwhile goes at the end."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC", "MASTER_"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def scontrol(tmp_path, stand_in):
    """``scontrol(body)`` puts a script in scontrol's place; ``scontrol.requests`` holds how it was called."""
    calls = tmp_path / "calls"

    def write(body):
        stand_in("scontrol", f'echo "$@" >> {calls}\n{body}')

    write.requests = lambda: calls.read_text().splitlines() if calls.exists() else []
    return write


@pytest.mark.parametrize(
    "variables, requests",
    [
        ({"SLURM_JOB_ID": "1002"}, ["requeue 1002"]),
        ({"SLURM_JOB_ID": "1002", "SLURM_ARRAY_JOB_ID": "1002", "SLURM_ARRAY_TASK_ID": "5"}, ["requeue 1002_5"]),
        ({"SLURM_JOB_ID": "1007", "SLURM_ARRAY_JOB_ID": "1002", "SLURM_ARRAY_TASK_ID": "4"}, ["requeue 1002_4"]),
        ({"SLURM_JOB_ID": "1002", "SLURM_PROCID": "1"}, []),
        ({"SLURM_JOB_ID": "1002", "SLURM_PROCID": "0", "RANK": "3"}, []),  # of torchrun, one task of which is on a node
        ({}, []),
    ],
)
def test_a_job_whose_time_is_up_has_itself_queued_again_and_no_sibling(environment, scontrol, variables, requests):
    """The last task of an array has the array's own id: `scontrol requeue` of that would be of all its tasks."""
    scontrol("")
    environment(**variables)
    requeue(Stopped(signal.SIGUSR1, 7))
    requeue(Stopped(signal.SIGTERM, 7))
    assert scontrol.requests() == requests


def test_a_job_that_cannot_be_queued_again_says_so(environment, scontrol, capsys):
    scontrol("echo 'Requested operation is presently disabled' >&2; exit 1")
    environment(SLURM_JOB_ID="1002")
    requeue(Stopped(signal.SIGUSR1, 7))
    assert "presently disabled" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables, rank",
    [
        (STEP, {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}),
        (STEP | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (STEP | {"SLURM_STEP_ID": "4294967290"}, None),  # salloc's shell, where that is a step of its own
        (STEP | {"SLURM_PTY_PORT": "40000"}, None),  # srun --pty bash
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # sbatch alone
    ],
)
def test_a_rank_knows_its_place_from_the_step_it_is_in(environment, variables, rank):
    environment(**variables)
    assert ranks.launched_rank() == rank


def test_steps_of_a_job_and_neighbouring_jobs_have_ports_of_their_own(environment, scontrol, monkeypatch):
    scontrol("echo 127.0.0.1")
    ports = set()
    for job in ("4242", "4243", "4244"):
        for step in ("0", "1", "2", "3"):
            for rank in ("0", "1"):
                environment(**STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_STEP_NODELIST": "n1"})
                monkeypatch.delenv("MASTER_ADDR", raising=False)
                monkeypatch.delenv("MASTER_PORT", raising=False)
                ranks._export({"RANK": rank})
                ports.add((job, step, os.environ["MASTER_PORT"]))
    assert len(ports) == len({port for *_, port in ports}) == 12


CFG = OmegaConf.create({"num_gpus": 0, "timeout": 1.0})


def test_a_rank_that_was_started_alone_says_for_whom_it_waits_and_gives_up(environment, monkeypatch, capsys):
    """A shell inside srun: it waited 30 minutes for a rank that nobody starts."""
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    port = str(free_port())
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with refused("MASTER_ADDR", f"127.0.0.1:{port}"):
        ranks.join(CFG)
    assert capsys.readouterr().err


def test_a_port_that_another_process_has_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with refused("MASTER_PORT", port):
            ranks.join(CFG)
