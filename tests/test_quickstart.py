"""README's main job as it is typed; tests/reproduce trains its runs, in their smallest form."""

import os
import subprocess

import pytest

from tests.conftest import ROOT


def is_set_up() -> bool:
    """Whether scripts/setup.sh would return at once, as it does after it was run."""
    stamp = ROOT / ".venv" / "koala-setup-suite"
    made_from = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "requirements.lock"))
    command = ["git", "hash-object", "--stdin"]
    digest = subprocess.run(command, input=made_from, capture_output=True, cwd=ROOT).stdout.decode().strip()
    return stamp.exists() and stamp.read_text().strip() == f"{digest} {ROOT}"


@pytest.mark.skipif(not is_set_up(), reason="scripts/setup.sh was not run here")
@pytest.mark.dist
def test_the_quickstart_compares_four_optimizers_on_three_seeds(tmp_path):
    command = ["bash", "scripts/quickstart.sh", "--dry-run", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python train.py") == 12
