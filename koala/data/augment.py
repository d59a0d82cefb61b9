"""Random crop, flip, cutout and normalisation of a whole batch at once, on the device that holds the images.

The random numbers of an epoch are drawn once, on the CPU, for every position in the epoch's order. So a
sample's augmentation is a function of (seed, epoch, position) alone: not of the device, the batch size or the
number of ranks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from koala.data.base import generator


@dataclass
class Draws:
    """Random numbers for N samples; None for what a data set does not use.

    ``crop``: int64 [N, 2] in [0, 2 padding]; ``flip``: bool [N]; ``cutout``: the square's centre, [N, 2].
    """

    crop: Tensor | None
    flip: Tensor | None
    cutout: Tensor | None

    def to(self, device: torch.device) -> "Draws":
        """Returns the draws on ``device``."""
        return Draws(*(None if t is None else t.to(device, non_blocking=True) for t in vars(self).values()))

    def __getitem__(self, chosen: slice) -> "Draws":
        return Draws(*(None if t is None else t[chosen] for t in vars(self).values()))


class Augment:
    """Turns uint8 images [B, C, H, W] into normalised float32 ones, augmented when draws are given.

    Args:
        mean, std: of pixel values 0..255, one for all channels or one each.
        crop_padding: pixels of black around the image, in which the crop moves.
        flip: mirror left-right with probability 1/2.
        cutout: side of the square set to zero *after* normalisation, i.e. to the mean colour, as in the cutout
            paper's code; its centre is anywhere in the image, so some may lie outside. 0: none.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        *,
        crop_padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shift = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.scale = torch.tensor(std, device=device).reciprocal().view(-1, 1, 1)
        self.crop_padding, self.flip, self.cutout = crop_padding, flip, cutout

    def draw(self, count: int, size: int, seed: int, epoch: int) -> Draws:
        """Draws for ``count`` images of ``size`` x ``size``.

        Each purpose has a generator of its own: to switch cutout on leaves the crops as they were.
        """

        def integers(high: int, shape: tuple[int, ...], purpose: str) -> Tensor:
            return torch.randint(high, shape, generator=generator(seed, epoch, purpose))

        return Draws(
            crop=integers(2 * self.crop_padding + 1, (count, 2), "crop") if self.crop_padding else None,
            flip=integers(2, (count,), "flip").bool() if self.flip else None,
            cutout=integers(size, (count, 2), "cutout") if self.cutout else None,
        )

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        size = images.shape[-1]
        if draws is not None and draws.crop is not None:
            # A view of every possible crop, [B, C, 2p + 1, 2p + 1, H, W]; one gather picks each image's own.
            windows = F.pad(images, [self.crop_padding] * 4).unfold(2, size, 1).unfold(3, size, 1)
            each = torch.arange(len(images), device=images.device)
            images = windows[each, :, draws.crop[:, 0], draws.crop[:, 1]]
        if draws is not None and draws.flip is not None:
            images = torch.where(draws.flip.view(-1, 1, 1, 1), images.flip(-1), images)
        pixels = images.float().sub_(self.shift).mul_(self.scale)
        if draws is not None and draws.cutout is not None:
            pixels.masked_fill_(self._holes(draws.cutout, size), 0.0)
        return pixels

    def _holes(self, centres: Tensor, size: int) -> Tensor:
        """Bool [B, 1, H, W], true in rows and columns [centre - side // 2, centre + side // 2)."""
        offset = torch.arange(size, device=centres.device) - centres.unsqueeze(-1)  # [B, 2, size]
        inside = (offset >= -(self.cutout // 2)) & (offset < self.cutout // 2)
        return (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1)
