"""Losses of the first steps of small runs are what they were: tests/golden.

A change that is not meant to change numbers must not. One that is: raise koala.numerics.VERSION, and
`python scripts/loss_compare.py --write`. They hold to 1e-9 on x86 processors with AVX2 or better. Without it those of
convolutions do not: initial weights are drawn in float32, and scaled there with one rounding more. Where the scale is a
power of two, as in the networks of the baselines, losses agree to 1e-14 also then.
"""

import pkgutil
import runpy
from pathlib import Path

import pytest
import yaml

import koala
from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "loss_compare.py"))
GOLDEN = sorted(SCRIPT["GOLDEN"].glob("*.txt"))
INFOS = koala.list_optimizers()
DATA = ("data=digits", "data=ptb")
FUSED = tuple(info.name for info in INFOS if info.observes != "outputs")
PORTABLE = [path for path in GOLDEN if path.stem.endswith(FUSED)]  # also without the compiled step


@pytest.mark.parametrize(
    "path, more",
    [*((path, []) for path in GOLDEN), *((path, ["optim.fused=false"]) for path in PORTABLE)],
    ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value) or "default",
)
def test_losses_are_the_golden_ones(path, more, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides, golden = SCRIPT["read_golden"](path)
    losses = SCRIPT["losses_of"]([*overrides, *more])
    step = SCRIPT["first_difference"](golden, losses)
    assert step is None, f"{path.stem}: step {step}: golden {golden.get(step)}, now {losses.get(step)}"


def test_golden_runs_cover_every_filter_baseline_and_schedule():
    runs = [" ".join(SCRIPT["read_golden"](path)[0]) + " " for path in GOLDEN]
    for info in INFOS:
        kinds = DATA[:1] if info.observes == "outputs" else DATA  # text is not for those
        assert all(any(f"{data} " in run and f"optim={info.name} " in run for run in runs) for data in kinds), info.name
    for path in (ROOT / "configs" / "optim").glob("*.yaml"):
        target = yaml.safe_load(path.read_text())["_target_"]
        if target.startswith("koala.baselines.") and "pytorch_optimizer" not in str(
            pkgutil.resolve_name(target).__mro__
        ):
            assert any(f"optim={path.stem} " in run for run in runs), path.stem  # its equations are ours
    schedules = [path.stem for path in (ROOT / "configs" / "schedule").glob("*.yaml")]
    for word in ["accumulation=", "grad_clip=", *(f"schedule={name} " for name in schedules)]:
        assert any(word in run for run in runs), word


def test_where_runs_part_is_the_first_step_that_differs():
    first = SCRIPT["first_difference"]
    assert first({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0 + 1e-12}) is None
    assert first({1: 2.0, 2: 1.0, 3: 0.5}, {1: 2.0, 2: 1.001, 3: 0.5}) == 2
    assert first({1: 2.0, 2: 1.0}, {1: 2.0}) == 2
    assert first({1: 2.0}, {1: float("nan")}) == 1


@pytest.mark.extended
def test_a_commit_agrees_with_itself(run_door):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git")
    run = "data=digits data.validation=1377 model=mlp optim=koala-m epochs=2 precision=fp64 num_gpus=0"
    done = run_door("scripts/loss_compare.py", "HEAD", "HEAD", "--run", *run.split())
    assert done.returncode == 0, done.stdout + done.stderr
