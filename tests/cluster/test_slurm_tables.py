"""scripts/reproduce.py and a real Slurm: what is refused before anything is submitted."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]


def test_unknown_slurm_option_submits_nothing(slurm, run_door, tmp_path):
    done = run_door("scripts/reproduce.py", "quickstart", "--profile", "smoke", "--launcher", "slurm", "--slurm",
                    "partitoin=gpu", "--output", str(tmp_path / "outputs"), env=slurm.environment)  # fmt: skip
    assert done.returncode == 2 and "partitoin" in done.stderr
    assert not (tmp_path / "outputs/slurm").exists()
