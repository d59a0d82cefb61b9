"""Processes that a launcher takes for ranks of one run, and that are none."""

import pytest

from tests.cluster.one_node_slurm import free_port
from tests.conftest import CONTEXT
from tests.faults.conftest import SMALL, live

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("differ", ["seed", "optim.lr", "log_every"])
def test_ranks_with_different_configurations_are_refused(differ, tmp_path):
    """`srun -n 2 bash -c 'python train.py seed=$SLURM_PROCID'`: each task was to be a run, and both trained as one."""
    port, ranks = str(free_port()), []
    for rank in range(2):
        launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        given = [
            *SMALL,
            "max_steps=2",
            f"output_root={tmp_path}/out",
            f"data_root={tmp_path}/data",
            f"{differ}={rank + 1}",
        ]
        arguments = (given, tmp_path / f"{rank}.log", launcher | {"MASTER_PORT": port})
        ranks.append(CONTEXT.Process(target=live_as_rank, args=arguments))
        ranks[-1].start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 1
    for rank in range(2):
        last = (tmp_path / f"{rank}.log").read_text().splitlines()[-1]
        assert f"ConfigError: {differ}=" in last
    assert not (tmp_path / "out").exists()


def live_as_rank(given, log, launcher):
    live(given, log, environment=launcher)
