"""DCGAN (Radford, Metz, Chintala, arXiv 1511.06434): a generator of images and a critic of them."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from koala.errors import ConfigError
from koala.schema import Schema, Word


class DCGANSpec(Schema):
    """``latent``: numbers that an image is made of; ``width``: channels beside the image, doubled at each halving.

    ``n_critic``, ``penalty``: of its training (koala/extras/adversarial.py); the rest of how its images are judged
    (koala/extras/frechet.py).
    """

    name: Word
    kind: Literal["gan"]
    arch: Literal["dcgan"]
    latent: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    n_critic: Annotated[int, Field(ge=1)]
    penalty: Annotated[float, Field(ge=0)]
    samples: Annotated[int, Field(ge=2)]
    features: Literal["inception", "random"]
    weights: str | None = None

    def build(self, num_classes: int, channels: int, size: int) -> nn.Module:
        """Builds both networks for images of ``channels`` x ``size`` x ``size``; the classes are not used."""
        if size < 16 or size & (size - 1):
            raise ConfigError(
                "data.resize", size, f"model={self.name} makes images of other sizes", valid="16, 32, 64, ..."
            )
        return DCGAN(self.latent, self.width, channels, size)


class DCGAN(nn.Module):
    """``generator`` maps z [B, latent] to images [B, C, size, size] in (-1, 1), ``critic`` images to scores [B].

    The critic has no normalisation: the gradient penalty is one of each sample, which a norm over the batch would mix.
    Convolutions start from N(0, 0.02^2), the generator's norms from N(1, 0.02^2).
    """

    def __init__(self, latent: int, width: int, channels: int, size: int):
        super().__init__()
        self.latent = latent
        widths = [width * 2**stage for stage in range(size.bit_length() - 3)]  # from the image's side to 4x4
        self.critic = nn.Sequential()
        for before, after in zip([channels, *widths], widths, strict=False):
            self.critic.extend([nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)])
        self.critic.extend([nn.Conv2d(widths[-1], 1, 4), nn.Flatten(0)])
        self.generator = nn.Sequential(
            nn.Unflatten(1, (latent, 1, 1)),
            nn.ConvTranspose2d(latent, widths[-1], 4, bias=False),
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(),
        )
        for before, after in zip(widths[::-1], widths[-2::-1], strict=False):
            self.generator.extend([nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False),
                                   nn.BatchNorm2d(after), nn.ReLU()])  # fmt: skip
        self.generator.extend([nn.ConvTranspose2d(widths[0], channels, 4, stride=2, padding=1), nn.Tanh()])
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, latent: Tensor) -> Tensor:
        """The generator's images."""
        return self.generator(latent)
