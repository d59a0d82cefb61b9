"""How far generated images are from real ones: the Frechet distance of features, and an image of samples.

Protocol. Real: the images of one pass over the training split, as training sees them: augmentation is to be off, and
`data.drop_last` leaves out an incomplete last batch (16 of CIFAR-10's 50,000 images at batch 64).
Generated: `model.samples` images of the generator in evaluation mode, from noise that a run draws once, the same at
every evaluation. Both are rounded to bytes; one channel becomes three. With `model.features=inception` the features are
the 2048 of the Inception-v3 that FID was defined with (Heusel et al., NeurIPS 2017), its weights ported from TensorFlow
by torch-fidelity, resized as TensorFlow 1 did; the number is then called `fid`. With `random` they are those of a small
fixed random network, which needs no download: `feature_distance`, which is not FID and is compared with nothing.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.utils import save_image

from koala.data.base import generator
from koala.errors import ConfigError
from koala.extras.adversarial import Scale
from koala.training.evaluation import Evaluation

SAMPLES = 64  # in an image


class RandomFeatures(nn.Module):
    """64 features of a fixed, randomly drawn network: uint8 images [B, 3, H, W] to [B, 64]."""

    num_features = 64

    def __init__(self):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            for weight in convolution.parameters():
                nn.init.normal_(weight, 0.0, (9 * inputs) ** -0.5, generator=source)
            layers += [convolution, nn.ReLU()]
        self.layers = nn.Sequential(*layers).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1).mean((2, 3))


class AdversarialEvaluation(Evaluation):
    """A row's distance between generated and real images, and an image of samples at that step.

    Raises:
        ConfigError: Inception's weights cannot be loaded.
    """

    def __init__(self, cfg, ranks, arithmetic, data, module, between_batches, folder: Path):
        super().__init__(cfg, ranks, arithmetic, data, module, None, between_batches)
        self.folder, self.scale = folder / "samples", Scale(cfg.data)
        self.name, self.distance = distance_of(cfg.model, ranks.device)
        self.has_real = False

    @torch.no_grad()
    def metrics(self, row: dict) -> dict[str, float]:
        """The distance at the present weights; the image goes to its file."""
        if not self.has_real:
            for batch in self._checked(self.data.train.epoch(0)):
                self._add(self.arithmetic.cast(batch).inputs, real=True)
            self.has_real = True
        self.distance.reset()  # of the generated only
        self.module.eval()
        source = generator(self.cfg.seed, "samples")
        self.image = self._samples(row["step"])
        for start in range(0, self.cfg.model.samples, self.cfg.eval_batch_size):
            self.between_batches()
            count = min(self.cfg.eval_batch_size, self.cfg.model.samples - start)
            self._add(self._generated(count, source), real=False)
        self.module.train()
        return {self.name: self.distance.compute().item()}

    def _samples(self, step: int) -> Path:
        images = self._generated(SAMPLES, generator(self.cfg.seed, "picture"))
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step}.png"
        save_image(self.scale.as_bytes(images).float() / 255, path, nrow=8)
        return path

    def _generated(self, count: int, source: torch.Generator) -> Tensor:
        """Images from noise of `source`, which is the CPU's, so that every device draws the same."""
        noise = torch.randn(count, self.module.latent, generator=source).to(next(self.module.parameters()))
        with self.arithmetic.autocast():
            return self.scale.normalised(self.module(noise).float())

    def _add(self, images: Tensor, real: bool) -> None:
        images = self.scale.as_bytes(images.float())
        self.distance.update(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images, real=real)


def distance_of(model, device: torch.device) -> tuple[str, FrechetInceptionDistance]:
    """The name of the number and what computes it."""
    if model.features == "random":
        return "feature_distance", FrechetInceptionDistance(RandomFeatures(), reset_real_features=False).to(device)
    try:
        distance = FrechetInceptionDistance(
            2048, reset_real_features=False, antialias=False, feature_extractor_weights_path=model.weights
        )
    except OSError as error:  # no such file, or no network to download from
        valid = (
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0, or model.features=random, "
            "which is not FID"
        )
        reason = f"FID takes the weights of Inception-v3, which cannot be loaded ({error})"
        raise ConfigError("model.weights", model.weights or "null", reason, valid=valid) from error
    return "fid", distance.to(device)
