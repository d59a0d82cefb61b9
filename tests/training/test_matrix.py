"""Every optimizer of configs/optim takes the same steps on ranks, accumulated, clipped, sharded, as in one process."""

import contextlib

import pytest

from koala.errors import ConfigError
from koala.runs.schema import options
from koala.training.optimizers import NEEDS, needs_of
from tests.refused import refused
from tests.training.conftest import closest
from tests.training.test_ranks import launch_all

OPTIMIZERS = options("optim")
# mlp has no BatchNorm, so that pieces of a batch normalise as the whole does
SMALL = ["model=mlp", "precision=fp64", "batch_size=60", "max_steps=3", "schedule=constant", "grad_clip=0.7"]
VARIANTS = {"two ranks, accumulated": ["cpu_procs=2", "accumulation=2"], "sharded": ["cpu_procs=2", "strategy=fsdp"]}
DIFFERENTIATES = ("adahessian", "sophia")
# Their statistics are of a pass over a piece, not of the batch: other steps, by their own definition.
BY_PASS = {"adafisher", "adafisherw", "kfac"}
# Its factors begin singular (fewer gradients than rows), and rounding decides the basis of what they do not see.
BY_ROUNDING = {"soap"}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("way", VARIANTS)
def test_every_optimizer_takes_one_process_s_steps(runs, way):
    """The same global batch: two ranks end with the weights of one, in float64."""
    work = {}
    for name in OPTIMIZERS:
        chosen = [f"optim={name}", *SMALL, *VARIANTS[way]]
        with contextlib.suppress(ConfigError):  # who is refused, and why: tests/runs/test_matrix.py
            runs.compose(*chosen)
            work[name] = chosen
    assert len(work) > 15
    launch_all(runs, *work.values())
    one = runs.elsewhere("one")
    far = {}
    for name, chosen in work.items():
        single = [f"optim={name}", *SMALL, one]
        assert runs.launch(*single)["status"] == "finished"
        far[name] = closest(runs.weights(*single), runs.weights(*chosen))
    others = BY_PASS | BY_ROUNDING
    assert {name: distance for name, distance in far.items() if distance > 1e-9 and name not in others} == {}


@pytest.mark.parametrize("name", DIFFERENTIATES)
def test_who_differentiates_gradients_accumulates_and_is_refused_what_cannot_be(runs, name):
    full, pieces = [[f"optim={name}", *SMALL, part] for part in ("accumulation=1", "accumulation=3")]
    for chosen in (full, pieces):
        runs.launch(*chosen)
    assert closest(runs.weights(*full), runs.weights(*pieces)) < 1e-9
    with refused("compile", True, mentions=f"optim={name}"):
        runs.compose(f"optim={name}", "compile=true")


def test_the_table_of_needs_names_classes_that_are(runs):
    result = {needs_of(runs.compose(f"optim={name}").optim) for name in OPTIMIZERS}
    assert result >= set(NEEDS.values())
