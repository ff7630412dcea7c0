"""From the bytes of a file to pixels, whatever they are: no crash, no hang, no unbounded memory."""

from __future__ import annotations

import os
import re
import struct
import warnings
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

PIXELS = 100_000_000  # an image may have: up to 1.5 GB while it is decoded
LARGE = 20_000_000  # pixels from which images are decoded one at a time, not one a thread
# Beside JPEG. Others that Pillow knows start programs (EPS) or are seldom tried.
FORMATS = ("PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF")

# A JPEG's markers that a length follows; frame headers, which have height and width, among them.
MARKER = re.compile(rb"\xff+([\x02-\xcf\xda-\xfe])")
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}

# Nobody reads a warning an image: what cannot be read is refused, and PIXELS is the limit here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(encoded: bytes | memoryview) -> Tensor:
    """uint8 (3, H, W) of a JPEG, PNG, GIF, WebP, BMP, PPM or TIFF, upright as its EXIF says.

    The content tells which, not the name. Grey is repeated, CMYK and palettes are converted, alpha
    is dropped, of 16 bits the upper 8 stay, of an animation the first picture is taken. Raises
    ValueError with the reason where that fails, where an image has more than `PIXELS`, or where its
    pixels have no fixed range (floating point, 32 bits).
    """
    data = bytearray(encoded)
    if not data:
        raise ValueError("is empty")
    return _decode_jpeg(data) if data.startswith(b"\xff\xd8\xff") else _decode_other(data)


def _decode_jpeg(data: bytearray) -> Tensor:
    """By torchvision: fast, and unlike its decoder for PNG it holds against damage."""
    with _turn(*_jpeg_size(data)):
        try:
            buffer = torch.frombuffer(data, dtype=torch.uint8)
            return decode_jpeg(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
        except (RuntimeError, ValueError) as error:
            # PyTorch's C++ part puts "… file.cpp:123, " before the reason.
            reason = str(error).splitlines()[0].rpartition(".cpp:")[2].partition(", ")[2]
            raise ValueError(reason or "is a damaged JPEG") from None


def _jpeg_size(data: bytearray) -> tuple[int, int]:
    """Width and height out of the header, found as libjpeg finds it."""
    at = 2
    while True:
        marker = MARKER.search(data, at)
        if marker is None:
            break
        kind = marker[1][0]
        at = marker.end()
        length = int.from_bytes(data[at : at + 2])
        if length < 2:
            break
        if kind in FRAMES and len(data) >= at + 7:
            height, width = struct.unpack(">HH", data[at + 3 : at + 7])
            scans = data.count(b"\xff\xda") if kind in PROGRESSIVE else 1
            if scans > 1 and scans * height * width > 20 * PIXELS:
                raise ValueError(f"goes {scans} times over {width} × {height} pixels, too often")
            return width, height
        at += length
    raise ValueError("is a damaged JPEG")


def _decode_other(data: bytearray) -> Tensor:
    try:
        image = _open(data)
        with _turn(*image.size):
            if image.format == "PNG":
                image.verify()  # the checksums, which decoding passes over
                image = _open(data)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(image)
    except UnidentifiedImageError:
        raise ValueError(f"is no JPEG, {', '.join(FORMATS)}, or its header is damaged") from None
    except Exception as error:  # damage surfaces in Pillow as any kind of exception
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _open(data: bytearray) -> Image.Image:
    """Reads the header."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"has far more than {PIXELS // 10**6} million pixels") from None


def _pixels(image: Image.Image) -> Tensor:
    if image.mode == "F":
        raise ValueError("has floating-point pixels of unknown range: convert it to 8 bits")
    if image.mode.startswith("I"):
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        bits = tags.get(258, (16,))[0]  # BitsPerSample
        signed = 2 in tags.get(339, ())  # SampleFormat
        inverted = tags.get(262) == 0  # PhotometricInterpretation: 0 is white
        if bits > 16 or signed:
            kind = f"pixels of {bits} bits" if bits > 16 else "signed pixels"
            raise ValueError(f"has {kind}, range unknown: convert it to 8 bits")
        grey = torch.from_numpy((np.array(image) >> (bits - 8)).astype(np.uint8))
        grey = 255 - grey if inverted else grey
        return grey[None].repeat(3, 1, 1)
    if image.mode != "RGB":
        image.info.pop("transparency", None)  # would become alpha, with a warning
        image = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


_LARGE = Lock()
# Nobody may hold it at a fork: the thread that would free it is not in the child.
os.register_at_fork(
    before=_LARGE.acquire, after_in_parent=_LARGE.release, after_in_child=_LARGE.release
)


def _turn(width: int, height: int) -> AbstractContextManager:
    """Where to decode an image of this size; ValueError where it is too large."""
    if width * height > PIXELS:
        raise ValueError(f"has {width} × {height} pixels, more than {PIXELS // 10**6} million")
    return _LARGE if width * height > LARGE else nullcontext()
