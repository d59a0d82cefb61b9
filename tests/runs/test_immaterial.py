"""What is left out of a run's hash changes no number but the rounding of sums: seen in float64."""

import pytest

from koala.training.checkpoint import FOLDER
from tests.training.conftest import Runs, whole_state

# BatchNorm, convolutions, augmentation, two evaluations; 6 steps, so that rounding has not yet grown.
BASE = ["model=resnet10", "model.width=4", "precision=fp64", "epochs=2", "max_steps=6", "batch_size=512"]
SAME = {
    "layout": ["channels_last=false"],
    "deterministic": ["deterministic=true"],
    "batches of evaluation": ["eval_batch_size=7"],
    "looks": ["log_every=1"],
    "checkpoints": ["checkpoint_every=0", "checkpoint_async=true"],
    "targets": ["targets={val_loss:2.0}", "objective=test_loss"],
    "implementation of the update": ["optim.fused=false"],
    "limits": ["timeout=60", "max_restarts=1"],
}


def outcome(runs: Runs, *overrides: str) -> tuple[str, dict, dict]:
    """Hash, final weights and final metrics of a run."""
    given = [*BASE, *overrides]
    record = runs.launch(*given)
    newest = sorted((runs.folder(*given) / FOLDER).glob("step-*"))[-1]
    return record["config_hash"], whole_state(newest)["model"], record["metrics"]["final"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    result = {}

    def made(*overrides: str):
        if overrides not in result:
            result[overrides] = outcome(Runs(tmp_path_factory.mktemp("base")), *overrides)
        return result[overrides]

    return made


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    assert max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1]) < 1e-11
    numbers = [key for key in one[2] if key.endswith(("_loss", "_error"))]
    assert numbers and {key: one[2][key] for key in numbers} == pytest.approx({key: other[2][key] for key in numbers})


@pytest.mark.extended
@pytest.mark.parametrize("overrides", SAME.values(), ids=SAME.keys())
def test_same_numbers(tmp_path, base, overrides):
    assert_same(outcome(Runs(tmp_path), "optim=koala-m", *overrides), base("optim=koala-m"))


@pytest.mark.extended
@pytest.mark.parametrize("overrides", [["optim.foreach=false"], ["optim.foreach=true"], ["optim.fused=true"]])
def test_torchs_implementations_of_an_update_are_one(tmp_path, base, overrides):
    assert_same(outcome(Runs(tmp_path), "optim=adam", *overrides), base("optim=adam"))


@pytest.mark.slow
def test_compiled_is_the_same(tmp_path, base):
    assert_same(outcome(Runs(tmp_path), "optim=koala-m", "compile=true"), base("optim=koala-m"))


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_are_not(tmp_path, base):
    """Why they are in the hash: BatchNorm's statistics are those of a rank's samples."""
    runs = Runs(tmp_path)
    record = runs.launch(*BASE, "optim=koala-m", "cpu_procs=2")
    alone, _, final = base("optim=koala-m")
    assert record["config_hash"] != alone and record["ranks"] == 2
    assert record["metrics"]["final"]["val_loss"] != pytest.approx(final["val_loss"], rel=1e-4)
