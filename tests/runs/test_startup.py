"""What is answered without training imports nothing of it: help, bad input and a finished run are quick."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.extended

LONG = {"torch._dynamo", "torch.distributed.tensor", "torchvision", "timm", "transformers", "koala.training.loop"}
SMALL = ["data=digits", "model=mlp", "max_steps=1", "logger=none", "num_gpus=0"]


def imported(*arguments: str, status: int) -> set[str]:
    """The names of all modules that `python train.py *arguments` imports."""
    command = [sys.executable, "-X", "importtime", "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_the_help_page():
    assert not imported("--help", status=0) & LONG


def test_bad_input():
    assert not imported("optim.lrr=1", status=2) & LONG


def test_a_finished_run(tmp_path):
    given = [*SMALL, f"output_root={tmp_path}"]
    assert "koala.training.loop" in imported(*given, status=0)
    assert not imported(*given, status=0) & LONG
