"""Small image sets for tests, made with pyarrow and PIL alone: image k is ``sample_image(k)``, its label k % 3."""

import io

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

from koala.data import Loading, build

SIZE, CLASSES = 5, 3
CFG = {
    "name": "tiny", "kind": "images", "path": None, "hub": None, "classes": 3, "size": 5, "channels": 3,
    "mean": [0.0], "std": [1.0], "image_column": "img", "label_column": "fine_label",
}  # fmt: skip


def sample_image(number: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, numbers, image_column="img", label_column="fine_label", size=SIZE):
    images = [{"bytes": png(sample_image(number, size)), "path": None} for number in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([number % CLASSES for number in numbers], pa.int64())
    table = pa.table({image_column: pa.array(images, kind), "extra": labels, label_column: labels})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, compression="none")


def sample_images(numbers, size=SIZE):
    return torch.stack([torch.from_numpy(sample_image(number, size)).permute(2, 0, 1) for number in numbers])


def write_folder(folder, numbers, size=SIZE):
    """Writes folder/<class>/<number>.png, the classes being a, b and c."""
    for number in numbers:
        file = folder / "abc"[number % CLASSES] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample_image(number, size)).save(file)


def load(folder, tmp_path, batch_size=4, **cfg):
    return build(
        CFG | {"path": None if folder is None else str(folder)} | cfg,
        Loading(1, batch_size, 4, data_root=tmp_path / "cache"),
    )


def cache_of(tmp_path):
    return sorted((tmp_path / "cache").glob("*.safetensors"))
