"""Every kind of image becomes the same RGB, and no bytes whatever end the process or fill the memory."""

import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import encode_jpeg

from densenas.images.decoding import decode
from densenas.images.transforms import ELONGATION, middle, transform

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def jpeg():
    return encode_jpeg(noise(24, 24)).numpy().tobytes()


def saved(picture, kind, **options):
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_every_kind_of_image_becomes_rgb(kind, mode, tmp_path):
    """As PIL shows it; JPEG and WebP lose a little."""
    ramp = np.arange(0, 250, 10, dtype=np.uint8)[None].repeat(20, axis=0)
    picture = Image.merge(
        "RGB", [Image.fromarray(channel) for channel in (ramp, 250 - ramp, ramp // 2)]
    ).convert(mode)
    try:
        picture.save(tmp_path / "x", kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no mode {mode}")
    ours, theirs = decode((tmp_path / "x").read_bytes()), Image.open(tmp_path / "x").convert("RGB")
    assert ours.dtype == torch.uint8
    far = (ours.int() - torch.from_numpy(np.array(theirs)).movedim(2, 0).int()).abs().float()
    assert far.mean() < 3 and (kind == "JPEG" or far.max() <= 16)


@given(st.integers(0, 65535))
def test_16_bits_become_8(value):
    image = decode(saved(Image.fromarray(np.full((5, 7), value, dtype=np.uint16)), "PNG"))
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 7)
    assert abs(image.unique().item() - value / 257) <= 1


@given(
    st.binary(max_size=60) | st.builds(lambda cut: jpeg()[:cut], st.integers(0, len(jpeg()) - 1))
)
def test_what_is_no_image_is_refused_in_one_line(encoded):
    with refused(ValueError, "."):
        decode(encoded)


@pytest.mark.parametrize(
    ("kind", "order"), [("PNG", "<u2"), ("PPM", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")]
)
def test_of_16_bits_the_upper_8_stay(kind, order):
    values = np.arange(0, 65536, 321).astype(order)[None].repeat(3, axis=0)
    image = decode(saved(Image.fromarray(values), kind))
    assert torch.equal(image, torch.from_numpy((values >> 8).astype(np.uint8)).repeat(3, 1, 1))


def test_where_0_is_white_16_bits_are_turned_round():
    values = np.arange(0, 65536, 321).astype(np.uint16)[None]
    image = decode(saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0}))
    assert torch.equal(image[0], 255 - torch.from_numpy((values >> 8).astype(np.uint8)))


def test_signed_pixels_of_16_bits_are_refused():
    """As scanners in hospitals write them, from -1024 on: their upper 8 bits are no grey."""
    with refused(ValueError, "has signed pixels, range unknown: convert it to 8 bits"):
        decode(saved(Image.fromarray(np.ones((4, 4), dtype=np.uint16)), "TIFF", tiffinfo={339: 2}))


@pytest.mark.parametrize(("kind", "said"), [(np.float32, "floating-point"), (np.int32, "32 bits")])
def test_pixels_without_a_range_are_refused(kind, said):
    with refused(ValueError, said):
        decode(saved(Image.fromarray(np.ones((4, 4), dtype=kind)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photograph_stands_upright(kind):
    picture, exif = Image.new("RGB", (30, 10)), Image.Exif()
    exif[0x112] = 6
    assert decode(saved(picture, kind, exif=exif)).shape == (3, 30, 10)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_picture(kind):
    frames = [Image.new("RGB", (20, 20), shade) for shade in ("red", "blue")]
    image = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert (image[:, 9, 9] - torch.tensor([255, 0, 0])).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped_and_not_blended(kind):
    picture = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert decode(saved(picture, kind, **options))[:, 0, 0].tolist() == [200, 100, 50]


KINDS = {
    "JPEG": {},
    "PNG": {},
    "GIF": {},
    "WEBP": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "progressive JPEG": {"progressive": True},
    "lossless WEBP": {"lossless": True},
    "LZW TIFF": {"compression": "tiff_lzw"},
    "deflated TIFF": {"compression": "tiff_deflate"},
    "JPEG TIFF": {"compression": "jpeg"},
}


def with_right_checksums(png):
    """A damaged PNG whose checksums are made anew."""
    mended, at = png[:8], 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4])
        chunk = png[at + 4 : at + 8 + length]
        mended += png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4)
        at += 12 + length
    return mended


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_an_image_or_in_a_sentence(kind):
    """torchvision's decoder for PNG died of every second such file."""
    picture = Image.fromarray(noise(12, 14).permute(1, 2, 0).numpy())
    encoded = saved(picture, kind.split()[-1], **KINDS[kind])
    dice, refusals = random.Random(kind), 0
    for _ in range(150):
        damaged = bytearray(encoded)
        for _ in range(dice.choice((1, 1, 3))):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        cut = len(damaged) if dice.random() < 0.8 else dice.randrange(len(damaged))
        damaged = bytes(damaged[:cut])
        if kind == "PNG" and dice.random() < 0.7:
            damaged = with_right_checksums(damaged)
        try:
            image = decode(damaged)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refusals += 1
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert refusals


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF"])
def test_a_truncated_file_is_refused(kind):
    encoded = saved(Image.fromarray(noise(40, 40).permute(1, 2, 0).numpy()), kind)
    for share in (0.3, 0.7, 0.95):
        with refused(ValueError, "."):
            decode(encoded[: int(share * len(encoded))])


def test_a_png_with_a_wrong_checksum_is_refused():
    """Its pixels may decode all the same, to others."""
    encoded = bytearray(saved(Image.new("L", (90, 90), 7), "PNG", compress_level=0))
    encoded[len(encoded) // 2] ^= 1
    with refused(ValueError, "."):
        decode(encoded)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    said = r"has \d+ × \d+ pixels, more than 100 million|has far more than 100 million pixels"
    small = Image.new("L", (9, 9))
    for side in (11_000, 65_000):
        png = bytearray(saved(small, "PNG"))
        png[16:24] = struct.pack(">II", side, side)
        bmp = bytearray(saved(small, "BMP"))
        bmp[18:26] = struct.pack("<II", side, side)
        gif = bytearray(saved(small, "GIF"))
        gif[6:10] = struct.pack("<HH", side, side)
        ppm = saved(small, "PPM").replace(b"9 9", f"{side} {side}".encode())
        tiff = saved(Image.new("1", (7001, 7003)), "TIFF")
        tiff = tiff.replace(struct.pack("<H", 7001), struct.pack("<H", side), 1)
        if side == 11_000:
            tiff = tiff.replace(struct.pack("<H", 7003), struct.pack("<H", side), 1)
        for encoded in (with_right_checksums(bytes(png)), bmp, gif, ppm, tiff):
            with refused(ValueError, said):
                decode(encoded)
    frame = b"\xff\xc0\x00\x0b\x08\xff\xdc\xff\xdc\x01\x01\x11\x00"
    with refused(ValueError, said):
        decode(b"\xff\xd8\xff\xe0\x00\x02" + frame)
    encoded = bytearray(saved(Image.new("RGB", (9, 9)), "WEBP", lossless=True))
    encoded[21:25] = (16_382 | 16_382 << 14).to_bytes(4, "little")  # width and height less one
    with refused(ValueError, said):
        decode(encoded)


def test_a_jpeg_that_goes_over_its_pixels_too_often_is_refused():
    encoded = saved(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    scan = encoded.index(b"\xff\xda")
    with refused(ValueError, r"goes \d+ times over 2000 × 2000 pixels"):
        decode(encoded[:scan] + encoded[scan:-2] * 1000 + encoded[-2:])


def test_only_the_middle_of_a_line_is_used():
    photograph = noise(30, 40)
    assert torch.equal(middle(photograph), photograph)
    line = torch.arange(60_000).div(60_000 / 256).byte().expand(3, 2, 60_000)
    for image in (line, line.mT):
        assert middle(image).shape[1:].numel() == 2 * 2 * ELONGATION
        assert (middle(image).int() - 128).abs().max() <= 1
    for augment in (None, "weak", "rand_scale", "random_sized"):
        assert transform(augment, 224)(line).shape == (3, 224, 224)
