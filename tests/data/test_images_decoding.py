"""From bytes to pixels: what cannot be decoded is named, and what can has the pixels that a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps
from pyarrow import parquet

from koala.data import decode
from koala.data.encoded import Files
from tests.data.image_sets import cache_of, load, png, sample_image
from tests.refused import refused


def encode(array, format, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def grey(dtype, format):
    return encode((np.arange(25).reshape(5, 5) * 9).astype(dtype), format)


def black_png(size, bits, colour, stored):
    """A PNG of ``size`` x ``size`` pixels that says what PIL does not write, with ``stored`` bytes of black."""
    header = struct.pack(">IIBBBBB", size, size, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(stored))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


BAD_IMAGES = {  # and what the reason names
    "empty": ({"bytes": b"", "path": None}, ""),
    "null": (None, ""),
    "null bytes": ({"bytes": None, "path": None}, ""),
    "path": ({"bytes": None, "path": "/etc/passwd"}, "/etc/passwd"),
    "text": ({"bytes": b"no image at all", "path": None}, ""),
    "cut": ({"bytes": png(sample_image(1))[:60], "path": None}, ""),
    "bomb": ({"bytes": black_png(20_000, 8, 0, 10**6), "path": None}, "400000000"),
    "large": ({"bytes": black_png(12_000, 8, 0, 10**6), "path": None}, "12000x12000"),
    "16 bits": ({"bytes": grey(np.uint16, "PNG"), "path": None}, ""),
    "16 bits RGB": ({"bytes": black_png(5, 16, 2, 5 * 31), "path": None}, ""),
    "32 bits": ({"bytes": grey(np.int32, "TIFF"), "path": None}, ""),
    "float": ({"bytes": grey(np.float32, "TIFF"), "path": None}, ""),
}


@pytest.mark.parametrize(
    ("bad", "workers"),  # None: decoded before training; the way back from a worker is one for all
    [(bad, workers) for bad in BAD_IMAGES for workers in (None, 0)] + [("null", 1), ("large", 1)],
)
def test_a_bad_image_is_one_message_that_names_its_row(folder, tmp_path, bad, workers):
    image, name = BAD_IMAGES[bad]
    file = folder / "train-00001-of-00002.parquet"  # whose first row is the split's tenth
    table = parquet.read_table(file)
    images = [image if row == 7 else one for row, one in enumerate(table["img"].to_pylist())]
    parquet.write_table(table.set_column(0, "img", pa.array(images, table.schema.field("img").type)), file)
    with refused(f"data.path={folder}: row 17 of the train split", mentions=name):
        if workers is None:
            load(folder, tmp_path)
        else:
            list(load(folder, tmp_path, batch_size=24, streaming=True, workers=workers).train.epoch(0))
    assert not cache_of(tmp_path)


def jpeg(orientation=None, mode="RGB", exif=None, segment=b""):
    ramp = np.stack([np.add.outer(np.arange(16) * 4, np.arange(24) * k).astype(np.uint8) for k in (1, 4, 9)], 2)
    image, buffer = Image.fromarray(ramp).convert(mode), io.BytesIO()
    tags = image.getexif()
    if orientation:
        tags[0x0112] = orientation
    image.save(buffer, "JPEG", quality=95, exif=tags if exif is None else exif)
    return buffer.getvalue()[:2] + segment + buffer.getvalue()[2:]


def xmp(orientation):
    body = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='%d'/>" % orientation
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body


TURNED = {
    **{f"orientation {k}": jpeg(k) for k in range(1, 9)},
    "none": jpeg(),
    "grey": jpeg(6, "L"),
    "CMYK": jpeg(6, "CMYK"),
    "no known orientation": jpeg(77),
    "EXIF that is none": jpeg(exif=b"Exif\0\0garbage"),
    "only in XMP": jpeg(segment=xmp(6)),
}


@pytest.mark.parametrize("case", TURNED)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_do_not_depend_on_the_decoder_that_is_installed(tmp_path, monkeypatch, case, channels):
    """A photograph is upright, as a viewer shows it, with torchcodec and without."""
    (tmp_path / "a.jpg").write_bytes(TURNED[case])
    files = Files([tmp_path / "a.jpg"], [tmp_path.name])
    seen = [decode.pixels(files, 0, channels)]
    monkeypatch.setattr(decode, "decode_jpeg", None)
    seen.append(decode.pixels(files, 0, channels))
    assert torch.equal(*seen)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(TURNED[case]))).convert("RGB" if channels == 3 else "L")
    assert torch.equal(seen[0], torch.from_numpy(np.array(upright)).view(*upright.size[::-1], -1).permute(2, 0, 1))
