"""What sbatch refuses: scripts stand in for Slurm's programs, so this needs none."""

import pytest

pytestmark = pytest.mark.extended

REFUSAL = "sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed\n"
PROGRAMS = {
    "sbatch": f"printf '{REFUSAL}' >&2; exit 1",
    "sinfo": "echo 'main: 1 nodes of 4 CPUs, gres (null), time infinite'",
    "srun": "exit 1",
}
DOORS = {
    "train.py": ["-m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "data=digits", "num_gpus=0"],
    "scripts/reproduce.py": ["quickstart", "--profile", "smoke", "--launcher", "slurm", "--slurm", "partition=gpu"],
}


@pytest.mark.parametrize("door", DOORS)
def test_what_sbatch_refuses_is_bad_input_in_one_line(door, stand_in, run_door, tmp_path):
    for program in PROGRAMS.items():
        stand_in(*program)
    where = [] if door == "train.py" else ["--output", str(tmp_path / "outputs")]
    done = run_door(door, *DOORS[door], *where)
    assert done.returncode == 2 and done.stderr.startswith(REFUSAL), done.stderr
    (line,) = done.stderr.removeprefix(REFUSAL).splitlines()
    for part in ("partition=gpu", "invalid partition specified", "main: 1 nodes of 4 CPUs"):
        assert part in line
