"""Image sets: small ones are decoded once and live on the device (koala.data.resident), large ones are streamed
(koala.data.streaming). Both give batches that depend on (seed, epoch, step) alone."""

from pathlib import Path

from koala.data import resident
from koala.data.augment import Augment
from koala.data.base import Data, Loading
from koala.data.decode import decoded, resized
from koala.data.spec import ImageSpec


def build(spec: ImageSpec, loading: Loading) -> Data:
    """See koala.data.build. Images are cached below ``data_root``, except the digits and those of streamed
    sets."""
    if spec.streaming:
        from koala.data import streaming

        return streaming.build(spec, loading)
    stored, commit = decoded(spec, Path(loading.data_root))
    splits = {split: (resized(images, spec.input_shape[-1]), labels) for split, (images, labels) in stored.items()}
    augment = Augment(
        spec.mean, spec.std, crop_padding=spec.crop_padding, flip=spec.flip, cutout=spec.cutout, device=loading.device
    )
    return resident.held(spec, splits, augment, loading, commit)
