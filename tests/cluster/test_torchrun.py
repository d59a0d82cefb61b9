"""Several nodes without a scheduler: an agent on each, which meet at a rendezvous."""

import os
import subprocess
import sys

import pytest

from koala import records
from koala.runs import compose, launch, run_dir
from tests.cluster.one_node_slurm import free_port

pytestmark = pytest.mark.extended

RUN = ["data=digits", "batch_size=62", "model=mlp", "logger=none", "num_gpus=0", "precision=fp64", "max_steps=20"]


@pytest.mark.dist
def test_two_agents_make_one_run(root, tmp_path):
    """Two nodes, as far as torchrun can tell: two agents of one rank each on this machine."""
    folders = [f"output_root={tmp_path}/two", f"data_root={tmp_path}/data"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=koala"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "train.py", *RUN, "num_nodes=2"]
    options = {"cwd": root, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "text": True}
    agents = [
        subprocess.Popen([*agent, *folders], stderr=subprocess.STDOUT, start_new_session=True, **options)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], printed
    record = records.read_record(run_dir(compose([*RUN, *folders, "ranks=2"])))
    assert record["world_size"] == 2
    alone = launch(compose([*RUN, f"output_root={tmp_path}/one", f"data_root={tmp_path}/data"]))
    for key, value in alone["metrics"]["final"].items():
        if key.endswith("_loss"):
            assert record["metrics"]["final"][key] == pytest.approx(value, abs=1e-9)
