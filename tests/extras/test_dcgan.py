"""DCGAN: shapes at every size, and a critic whose score of an image depends on that image alone."""

import pytest
import torch
import yaml

from koala.models import build
from tests.refused import refused


@pytest.fixture
def make(root):
    cfg = yaml.safe_load((root / "configs/model/dcgan.yaml").read_text())

    def make(size=16, channels=3, **keys):
        torch.manual_seed(0)
        return build(cfg | {"width": 4, "latent": 8} | keys, kind="images", num_classes=10,
                     input_shape=(channels, size, size))  # fmt: skip

    return make


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (64, 3)])
def test_images_and_scores_have_their_shapes(make, size, channels):
    model = make(size, channels)
    images = model.generator(torch.randn(5, 8))
    assert images.shape == (5, channels, size, size) and images.abs().max() < 1
    assert model.critic(images).shape == (5,) and torch.equal(
        model(torch.zeros(2, 8)), model.generator(torch.zeros(2, 8))
    )


def test_the_critic_judges_each_image_alone_and_has_second_derivatives(make):
    critic, images = make().critic.double(), torch.randn(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    scores = critic(images)
    torch.testing.assert_close(scores, torch.cat([critic(images[:2]), critic(images[2:])]), rtol=1e-12, atol=0)
    (slopes,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    penalty = (slopes.flatten(1).norm(dim=1) - 1).square().mean()
    penalty.backward()
    assert all(p.grad is not None for name, p in critic.named_parameters() if name.endswith("weight"))


def test_weights_start_as_the_paper_says(make):
    model = make(64, width=32)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            assert abs(module.weight.std().item() - 0.02) < 0.004


def test_other_sizes_are_reported(make):
    with refused("data.resize", 8):
        make(8)
    with refused("model.latent", 0):
        make(latent=0)
