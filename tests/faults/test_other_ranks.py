"""Processes that a launcher takes for ranks of one run, and that are none."""

import pytest

from tests.cluster.one_node_slurm import free_port
from tests.conftest import CONTEXT
from tests.faults.conftest import SMALL, live

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("differ", ["seed", "optim.lr", "log_every"])
def test_ranks_with_different_configurations_are_refused(differ, tmp_path, folders):
    """`srun -n 2 bash -c 'python train.py seed=$SLURM_PROCID'`: each task was to be a run, and both trained as one."""
    address, ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}, []
    for rank in range(2):
        launcher = address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        given = [*SMALL, "max_steps=2", *folders, f"{differ}={rank + 1}"]
        started = {"args": (given, tmp_path / f"{rank}.log"), "kwargs": {"environment": launcher}}
        ranks.append(CONTEXT.Process(target=live, **started))
        ranks[-1].start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 1
    for rank in range(2):
        last = (tmp_path / f"{rank}.log").read_text().splitlines()[-1]
        assert f"ConfigError: {differ}=" in last
    assert not (tmp_path / "outputs").exists()
