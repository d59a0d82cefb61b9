"""At which step do two commits part? Trains small runs with each, in float64, and compares their losses.

    python scripts/loss_compare.py main HEAD                               # the golden runs: tests/golden/*.txt
    python scripts/loss_compare.py main HEAD --run data=digits epochs=3    # one run, given as to train.py
    python scripts/loss_compare.py --write                                 # golden losses of this checkout, on purpose

A golden file has the overrides of its run in the first line and a loss a step below. An epoch of these runs is one
step, so that the rows of a run's history are its steps. Runs given by --run are compared a row at a time.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = 1e-9  # relative: far above rounding of so few steps in float64, far below any other change

Losses = dict[int, float]  # by step


def read_golden(path: Path) -> tuple[list[str], Losses]:
    """Overrides of a golden run, and its losses."""
    first, *losses = path.read_text().splitlines()
    return first.split(), dict(enumerate(map(float, losses), 1))


def losses_of(overrides: list[str]) -> Losses:
    """Trains a run in a temporary folder; its training losses by step."""
    from koala.records import read_history
    from koala.runs import compose, launch, run_dir

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        cfg = compose([*overrides, "logger=none", f"output_root={folder}/outputs", f"data_root={folder}/data"])
        launch(cfg)
        return {row["step"]: row["train_loss"] for row in read_history(run_dir(cfg))}


def first_difference(one: Losses, other: Losses) -> int | None:
    """First step at which two runs have not the same loss, or None."""
    for step in sorted(one | other):
        if step not in one or step not in other or not math.isclose(one[step], other[step], rel_tol=TOLERANCE):
            return step
    return None


def losses_at(commit: str, runs: dict[str, list[str]]) -> dict[str, Losses]:
    """Losses of `runs` by name, trained by a checkout of `commit`."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            # -P: the modules are those of PYTHONPATH, while paths in overrides are relative to this checkout.
            command = [sys.executable, "-P", __file__, "--train", json.dumps(runs)]
            environment = os.environ | {"PYTHONPATH": str(tree)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    if done.returncode:
        sys.exit(f"{commit}: {done.stderr.strip()}")
    return {name: {int(step): loss for step, loss in one.items()} for name, one in json.loads(done.stdout).items()}


def compare(one: str, other: str, runs: dict[str, list[str]]) -> int:
    """Prints where the commits part, a line a run; returns 1 if they do."""
    ours, theirs = losses_at(one, runs), losses_at(other, runs)
    parted = 0
    for name in runs:
        step = first_difference(ours[name], theirs[name])
        if step is None:
            print(f"{name}: equal for {len(ours[name])} rows, to a relative {TOLERANCE:g}")
        else:
            parted = 1
            print(f"{name}: step {step}: {one} {ours[name].get(step)}, {other} {theirs[name].get(step)}")
    return parted


def main() -> int:
    """The command line; returns the exit status: 1 if the commits part."""
    parser = argparse.ArgumentParser(prog="loss_compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="two commits to compare")
    parser.add_argument("--run", nargs="+", metavar="OVERRIDE", help="this run instead of the golden ones")
    parser.add_argument("--write", action="store_true", help="rewrite tests/golden with this checkout")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)  # {name: overrides}; losses as JSON
    options = parser.parse_args()
    if options.train:
        print(json.dumps({name: losses_of(overrides) for name, overrides in options.train.items()}))
        return 0
    golden = {path.stem: read_golden(path)[0] for path in sorted(GOLDEN.glob("*.txt"))}
    if options.write:
        sys.path.insert(0, str(ROOT))
        os.chdir(ROOT)
        for name, overrides in golden.items():
            lines = [" ".join(overrides), *map(repr, losses_of(overrides).values())]
            (GOLDEN / f"{name}.txt").write_text("\n".join(lines) + "\n")
        return 0
    if len(options.commits) != 2:
        parser.error("give two commits to compare, or --write")
    return compare(*options.commits, {"run": options.run} if options.run else golden)


if __name__ == "__main__":
    sys.exit(main())
