"""Several ranks are one run: same losses, same weights, same bits on every rank, whatever their number."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from koala.runs import identify, launch
from koala.runs.on_rank import run
from koala.training import parallel
from koala.training.workers import start
from tests.refused import assert_names, refused
from tests.training.conftest import Unplugged, closest, unplugged_before

pytestmark = pytest.mark.dist

# One look at the loss a step; digits in 20 steps of 62, which 3 ranks share unevenly.
STEPS = ["precision=fp64", "batch_size=62", "max_steps=20", "log_every=1", "optim.weight_decay=5e-4"]
OPTIMIZERS = ["koala-v", "koala-m", "koala++", "sofim", "sgd", "adam"]


def run_all(cfg):
    """`run` on each of several configurations in the same workers, which take seconds to start."""
    return [run(item, identify(item), None) for item in map(OmegaConf.create, cfg.runs)]


def launch_all(runs, *lists: list[str]) -> list[dict]:
    cfgs = [runs.compose(*overrides) for overrides in lists]
    return start(OmegaConf.create({**cfgs[0], "runs": cfgs}), run_all)


def assert_equal_to_one_process(runs, several: list[str], single: list[str]) -> None:
    single = [*single, runs.elsewhere("one")]
    assert runs.launch(*single)["world_size"] == 1
    assert closest(runs.weights(*single), runs.weights(*several)) < 1e-10
    for ours, theirs in zip(runs.history(*several), runs.history(*single), strict=True):
        for key in ("train_loss", "val_loss", "test_loss", "test_top1_error"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-9)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process_on_the_same_global_batch(runs, strategy):
    two = [[f"optim={optim}", *STEPS, f"strategy={strategy}", "cpu_procs=2"] for optim in OPTIMIZERS]
    assert [record["world_size"] for record in launch_all(runs, *two)] == [2] * len(two)
    for overrides in two:
        assert_equal_to_one_process(runs, overrides, overrides[:-2])


def test_three_ranks_with_uneven_parts_and_accumulation(runs):
    three = ["optim=koala-m", *STEPS, "accumulation=2", "cpu_procs=3"]
    runs.launch(*three)
    assert_equal_to_one_process(runs, three, ["optim=koala-m", *STEPS])


@pytest.mark.extended
def test_synchronised_batch_norm_makes_two_ranks_one_process(runs):
    """Statistics of 31 images on each rank are those of the 62; without sync_bn the ranks train another network."""
    network = ["optim=koala-m", *STEPS[:2], "max_steps=4", "model=resnet18", "model.width=4", "model.layers=[1,1,1,1]"]
    two, apart = [*network, "sync_bn=true", "cpu_procs=2"], [*network, "cpu_procs=2"]
    launch_all(runs, two, apart)
    assert_equal_to_one_process(runs, two, network)
    assert closest(runs.weights(*two), runs.weights(*apart)) > 1e-6


@pytest.mark.extended
def test_synchronised_batch_norm_of_channels_far_from_zero():
    """The mean of squares less the square of the mean is below zero there in float32."""
    torch.manual_seed(0)
    images = torch.cat([torch.full((4, 1, 8, 8), 100.7), 100 + 0.01 * torch.randn(4, 1, 8, 8)], dim=1)
    ours, exact = parallel.SyncBatchNorm(2), torch.nn.BatchNorm2d(2).double()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.testing.assert_close(ours(images), exact(images.double()).float())
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(ours.running_mean, exact.running_mean.float())
    torch.testing.assert_close(ours.running_var, exact.running_var.float())


@pytest.mark.slow  # a unit is compiled after the other
@pytest.mark.timeout(600)
def test_units_of_a_sharded_network_are_compiled_each_to_its_own_widths(runs):
    """Inductor failed over a unit that was taken for another of its class with lengths that vary."""
    network = ["optim=koala-m", "batch_size=62", "max_steps=3", "model=resnet18", "model.width=8"]
    plain = [*network, "cpu_procs=2", "strategy=fsdp"]
    compiled = [*plain, "compile=true", runs.elsewhere("compiled")]
    launch_all(runs, plain, compiled)
    assert closest(runs.weights(*plain), runs.weights(*compiled)) < 1e-4


@pytest.mark.extended
@pytest.mark.parametrize("change", [["cpu_procs=2"], ["cpu_procs=1"]], ids=["1 to 2 ranks", "2 to 1 ranks"])
def test_a_run_goes_on_with_another_number_of_ranks(runs, change, capsys):
    """Broken off in the middle of an epoch, with the samples of the rest of it as they would have been."""
    straight = ["optim=koala-m", *STEPS, runs.elsewhere("one")]
    runs.launch(*straight)
    before = ["cpu_procs=1"] if change == ["cpu_procs=2"] else ["cpu_procs=2"]
    # A whole run of 20 steps, whose checkpoint of step 9 is what is left of it.
    part = ["optim=koala-m", *STEPS, *before, "checkpoint_every=0"]
    with pytest.raises((Unplugged, RuntimeError)):  # of this process, or of the ranks' agent
        start(cfg := runs.compose(*part), partial(dying_run, 9), identify(cfg), None)
    ranks = f"ranks={before[0][-1]}"
    record = runs.launch("optim=koala-m", *STEPS, *change, ranks)
    assert [(part["from"], part["to"], part["ranks"]) for part in record["segments"]] == [
        (0, 9, int(before[0][-1])),
        (9, 20, int(change[0][-1])),
    ]
    capsys.readouterr()
    assert runs.launch("optim=koala-m", *STEPS, *change, ranks) == record
    assert_names(capsys.readouterr().err, 9, 20)  # the steps on another number of ranks
    assert closest(runs.weights(*straight), runs.weights(*part)) < 1e-10


def dying_run(step, cfg, *arguments):
    """As `run`, but every rank stops dead before a step."""
    with unplugged_before(step):
        return run(cfg, *arguments)


def test_bad_input_found_by_workers_is_one_message(runs):
    with refused("batch_size", 5000):
        launch(runs.compose("cpu_procs=2", "batch_size=5000"))


def test_replicas_that_drift_apart_are_noticed(runs):
    """An optimizer that reads the rank's own loss, as a filter under plain DDP would."""
    run = ["optim=sgd", "cpu_procs=2", "max_steps=5"]
    cfg, still = runs.compose(*run), runs.compose(*run, "seed=2")
    assert start(still, partial(drifting_run, 0.0), identify(still), None)["status"] == "finished"
    with pytest.raises(RuntimeError):
        start(cfg, partial(drifting_run, 1e-3), identify(cfg), None)


def drifting_run(drift, cfg, *arguments):
    class Drifting(torch.optim.SGD):
        def step(self, closure):
            loss = super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(1 + drift * loss.float())
            return loss

    torch.optim.SGD = Drifting
    return run(cfg, *arguments)
