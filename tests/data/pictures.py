"""Small image sets for tests, made with pyarrow and PIL alone: image k is ``picture(k)``, its label k % 3."""

import io

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

SIZE, CLASSES = 5, 3


def picture(number: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, numbers, image_column="img", label_column="fine_label", size=SIZE):
    images = [{"bytes": png(picture(number, size)), "path": None} for number in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([number % CLASSES for number in numbers], pa.int64())
    table = pa.table({image_column: pa.array(images, kind), "extra": labels, label_column: labels})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, compression="none")


def pictures(numbers, size=SIZE):
    return torch.stack([torch.from_numpy(picture(number, size)).permute(2, 0, 1) for number in numbers])


def write_folder(place, numbers, size=SIZE):
    """Writes place/<class>/<number>.png, the classes being a, b and c."""
    for number in numbers:
        file = place / "abc"[number % CLASSES] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, size)).save(file)
