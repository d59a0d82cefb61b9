"""Adversarial training: the losses and steps of WGAN-GP, what is kept, and that nothing but FID is called so."""

import pytest
import torch
from PIL import Image

from koala import records
from koala.extras.adversarial import AdversarialStep, Pair, Scale
from koala.extras.dcgan import DCGAN
from koala.extras.frechet import RandomFeatures, distance_of
from koala.runs import compose, launch
from koala.runs.launch import report
from koala.training.machine import Arithmetic
from tests.refused import refused

GAN = ["model=dcgan", "model.width=8", "model.latent=4", "model.samples=80", "model.features=random",
       "schedule=constant", "data.resize=16", "data.mean=[127.5]", "data.std=[127.5]", "data.weight_decay=0",
       "eval_batch_size=30"]  # fmt: skip
ADAM = [*GAN, "optim=adam", "optim.lr=2e-4", "optim.betas=[0.5,0.999]"]
KOALA = [*GAN, "optim=koala-m", "optim.a=0.5", "optim.target=4.0"]


class OneRank:
    rank, world, device = 0, 1, torch.device("cpu")


def stepper(*overrides, seed=0, rate=0.01):
    cfg = compose(["data=digits", *ADAM, "precision=fp64", *overrides])
    torch.manual_seed(seed)
    module = DCGAN(4, 3, 1, 16).double()
    pair = Pair(*(torch.optim.SGD(net.parameters(), lr=rate) for net in (module.generator, module.critic)))
    arithmetic = Arithmetic("fp64", torch.device("cpu"), torch.contiguous_format)
    return AdversarialStep(cfg, OneRank, arithmetic, module, pair), module


class Batch:
    def __init__(self, inputs):
        self.inputs = inputs

    def _replace(self, inputs):
        return Batch(inputs)


class Nothing(torch.nn.Module):
    """A generator of zeros, whose weight still takes part."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, noise):
        return (self.weight * noise[:, :1]).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)


def test_losses_are_the_critics_with_penalty_and_every_nth_time_the_generators():
    """The slope of a linear critic is its weight w, so its losses are 0 - w.x + 10 (|w| - 1)^2."""
    step, module = stepper("model.n_critic=2", "model.penalty=10.0")
    linear = torch.nn.Linear(256, 1, bias=False).double()
    module.generator, module.critic = Nothing(), torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Flatten(0))
    step.optimizer = Pair(*(torch.optim.SGD(net.parameters(), lr=0.0) for net in (module.generator, module.critic)))
    real, w = torch.randn(5, 1, 16, 16, dtype=torch.float64), linear.weight[0].detach()
    losses = -real.flatten(1) @ w + 10 * (w.norm() - 1) ** 2
    tally = step(Batch(real), 5, step=0)
    torch.testing.assert_close(
        tally.sums, torch.tensor([5, losses.sum(), losses.square().sum(), 0, 0], dtype=torch.float64)
    )
    slope = -real.flatten(1).mean(0) + 20 * (w.norm() - 1) * w / w.norm()
    torch.testing.assert_close(linear.weight.grad[0], slope)
    assert module.generator.weight.grad is None
    tally = step(Batch(real), 5, step=1)
    assert tally["generator_sum"] == 0 and tally["generator_count"] == 5 and module.generator.weight.grad.abs() > 0
    torch.testing.assert_close(linear.weight.grad[0], slope)  # the generator's step leaves no gradient in the critic


def test_scale_between_tanh_data_and_bytes():
    images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
    digits, same = compose(["data=digits"]).data, compose(["data=digits", *GAN]).data
    assert torch.equal(Scale(same).normalised(images), images)
    for data in (digits, same):
        scale = Scale(data)
        assert scale.as_bytes(scale.normalised(images)).flatten().tolist() == [0, 128, 255]


@pytest.mark.extended
@pytest.mark.parametrize("overrides", [ADAM, [*KOALA, "logger=wandb"]], ids=["adam", "koala-m"])
def test_a_run_leaves_a_distance_that_is_not_called_fid_and_a_picture(runs, overrides, capsys):
    given = [*overrides, "max_steps=6", "model.n_critic=2"]
    record, folder = runs.launch(*given), runs.folder(*given)
    assert record["status"] == "finished" and record["throughput_unit"] == "images"
    [row] = records.read_history(folder)
    assert row["feature_distance"] > 0 and "fid" not in row and "train_generator_loss" in row
    assert Image.open(folder / "samples" / "step-6.png").size == (8 * 18 + 2, 8 * 18 + 2)
    mirrored = list(folder.glob("wandb/offline-*/files/media/images/*.png"))
    assert len(mirrored) == ("logger=wandb" in overrides)
    assert record["metrics"]["best"]["feature_distance"]["value"] == row["feature_distance"]
    report(record, record["config"]["output_root"])
    assert f"feature_distance {row['feature_distance']:.4g}" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_the_same_bits(runs, tmp_path):
    from koala.training.loop import Trainer

    full = runs.launch(*KOALA, "epochs=2", "max_steps=24", "seed=1")
    original, count = Trainer._between_steps, 0

    def interrupted(trainer):
        nonlocal count
        count += 1
        if count == 13:
            trainer.save()
            raise KeyboardInterrupt
        return original(trainer)

    Trainer._between_steps = interrupted
    try:
        cfg = runs.compose(*KOALA, "epochs=2", "max_steps=24", "seed=1", f"output_root={tmp_path / 'other'}")
        with pytest.raises(KeyboardInterrupt):
            launch(cfg)
    finally:
        Trainer._between_steps = original
    again = launch(cfg)
    assert again["metrics"]["final"] == full["metrics"]["final"]


def test_features_are_fixed_and_fid_says_what_it_needs(tmp_path):
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(1)
    first = RandomFeatures()(images)
    torch.manual_seed(2)
    assert torch.equal(first, RandomFeatures()(images))
    model = compose(["data=digits", *GAN, "model.features=inception", f"model.weights={tmp_path / 'none.pth'}"]).model
    with refused("model.weights", model.weights):
        distance_of(model, torch.device("cpu"))


def test_what_cannot_be_had_is_refused(runs):
    with refused("accumulation", 2, "1", mentions="model=dcgan"):
        runs.launch(*ADAM, "accumulation=2")
    with refused("ranks", 2, mentions="model=dcgan"):
        runs.launch(*ADAM, "num_gpus=0", "cpu_procs=2")
