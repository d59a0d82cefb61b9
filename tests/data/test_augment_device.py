"""Augmentation stays on the device of its images: on a CUDA device that is not there, of which no value can be read."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from koala.data.augment import Augment


@pytest.mark.parametrize("purposes", [{}, {"crop_padding": 4, "flip": True}, {"cutout": 8}])
def test_augments_where_the_images_are(purposes):
    with FakeTensorMode():
        augment = Augment([125.3], [63.0], **purposes, device="cuda")
        images = torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="cuda")
        draws = augment.draw(16, 32, seed=0, epoch=0).to(images.device)
        for augmented in (augment(images), augment(images, draws)):
            assert augmented.device == images.device
            assert (augmented.shape, augmented.dtype) == (images.shape, torch.float32)
