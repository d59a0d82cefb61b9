"""The oldest torch that pyproject.toml promises takes the same steps."""

import os
import subprocess
import sys
import tempfile
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

from .test_fused import STEP

TOOLS = ["numpy<2", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "expecttest"]
FILES = ("golden", "sgdf", "contract", "saving", "parameters", "refusals", "loss", "skips", "state",
         "implementations", "gains", "kernels", "frozen", "modes", "fused", "properties", "ranks", "ekf",
         "ekf_face", "jacobian")  # fmt: skip
# Torch's own: schedulers that call each other by a way that was given up, fake CUDA that wants a driver, an MPS that is
# not linked; and parameters with names, which came with torch 2.6.
TORCHS_OWN = "do_not_warn or fake_cuda or no_float64 or named_parameters"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_optimizers_run_on_the_oldest_torch():
    (torch,) = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    (oldest,) = [bound.version for bound in torch.specifier if bound.operator == ">="]
    with tempfile.TemporaryDirectory() as folder:  # gigabytes, not to be kept
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={oldest}.*", *TOOLS], check=True)
        files = [f"tests/optim/test_{name}.py" for name in FILES]
        tests = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", f"not ({TORCHS_OWN})", *files]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
        done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        # Its Triton is too old for the kernels; where a GPU (here the interpreter) would take them, portable steps are.
        triton = environment | {"TRITON_INTERPRET": "1"}
        done = subprocess.run([python, "-c", STEP, "None"], env=triton, capture_output=True, text=True)
        assert done.stdout == "portable [0.0, 0.0]\n", done.stderr
        assert "Triton" in done.stderr
