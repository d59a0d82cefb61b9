"""One real Slurm for all tests of this folder, and programs that stand in for one."""

import os

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


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """``stand_in(name, body)`` is found first where the program of this name is called: a script of the shell."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def write(name, body):
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    return write
