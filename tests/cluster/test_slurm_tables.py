"""scripts/reproduce.py through a real Slurm of one node: submit, leave, come back."""

import json

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]


def test_table_through_slurm_detached_and_found_again(slurm, run_door, tmp_path):
    command = ("scripts/reproduce.py", "quickstart", "--profile", "smoke", "--launcher", "slurm", "--slurm",
               "cpus_per_task=1", "--output", str(tmp_path / "outputs"), "max_steps=1")  # fmt: skip
    left = run_door(*command, "--detach", env=slurm.environment)
    assert left.returncode == 0 and "4 jobs submitted" in left.stdout, left.stdout + left.stderr
    back = run_door(*command, env=slurm.environment, timeout=240)
    assert back.returncode == 0 and "4 of 4 runs done, 0 failed" in back.stdout, back.stdout + back.stderr
    jobs = (tmp_path / "outputs/slurm/jobs.jsonl").read_text().splitlines()
    assert len({json.loads(line)["run"] for line in jobs}) == len(jobs) == 4  # coming back submitted nothing
    assert (tmp_path / "outputs/tables/smoke/tables/quickstart.md").exists()


def test_unknown_slurm_option_submits_nothing(slurm, run_door, tmp_path):
    done = run_door("scripts/reproduce.py", "quickstart", "--profile", "smoke", "--launcher", "slurm", "--slurm",
                    "partitoin=gpu", "--output", str(tmp_path / "outputs"), env=slurm.environment)  # fmt: skip
    assert done.returncode == 2 and "partitoin" in done.stderr
    assert not (tmp_path / "outputs/slurm").exists()
