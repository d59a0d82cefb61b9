"""One real Slurm for all tests of this folder."""

import pytest

from tests.cluster.one_node_slurm import CannotStart, OneNodeSlurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running one-node Slurm, or a skip that says why there is none."""
    try:
        cluster = OneNodeSlurm(tmp_path_factory.mktemp("cluster") / "slurm")
    except CannotStart as reason:
        pytest.skip(f"no Slurm: {reason}")
    yield cluster
    cluster.stop()
