"""Decoding, squashing and normalising agree with Pillow; what cannot be decoded is grey and said so."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from megatron_mm1.data.image_headers import image_size
from megatron_mm1.data.images import ImageProcessor, UnusableImage, check_image, decode, decoding
from tests.corpora import encoded

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def exif(orientation: int) -> bytes:
    tags = PIL.Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def animated(format: str, **options: object) -> bytes:
    frames = [PIL.Image.open(io.BytesIO(encoded(seed=seed))).convert("RGB") for seed in (0, 1)]
    content = io.BytesIO()
    frames[0].save(content, format, save_all=True, append_images=frames[1:], **options)
    return content.getvalue()


PICTURES = {
    "JPEG": encoded("JPEG", size=(31, 17)),
    "JPEG grey": encoded("JPEG", mode="L"),
    "JPEG CMYK": encoded("JPEG", mode="CMYK"),
    "JPEG progressive": encoded("JPEG", progressive=True),
    **{f"JPEG turned {turn}": encoded("JPEG", exif=exif(turn)) for turn in (2, 3, 6, 8)},
    "TIFF turned 6": encoded("TIFF", exif=exif(6)),
    "PNG": encoded("PNG"),
    "PNG alpha": encoded("PNG", mode="RGBA"),
    "PNG palette": encoded("PNG", mode="P"),
    "PNG grey": encoded("PNG", mode="L"),
    "PNG one bit": encoded("PNG", mode="1"),
    "WebP lossless": encoded("WEBP", lossless=True),
    "WebP": encoded("WEBP"),
    "WebP animated": animated("WEBP"),
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "GIF": encoded("GIF", mode="P"),
    "GIF animated": animated("GIF"),
    "AVIF": encoded("AVIF"),
    "WebP animated, turned": animated("WEBP", exif=exif(6)),
}


def by_pillow(data: bytes) -> PIL.Image.Image:
    return PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


BAD = {
    "empty": b"",
    "text": b"<html>404 not found</html>",
    "JPEG cut short": encoded("JPEG", size=(64, 64))[:700],
    "JPEG header alone": PICTURES["JPEG"][:20],
    "PNG cut short": encoded("PNG", size=(64, 64))[:100],
    "too many pixels": png_header(9_000, 9_000),
    "too wide": png_header(20_000, 8),
    "too large both ways": png_header(20_000, 20_000),
    "far too many pixels": png_header(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_decodes_as_pillow(kind: str) -> None:
    (pixels,) = decode([PICTURES[kind]])
    np.testing.assert_array_equal(pixels, np.asarray(by_pillow(PICTURES[kind])))


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 240).reshape(12, 20).astype(np.uint16)
    content = io.BytesIO()
    PIL.Image.fromarray(deep).save(content, "PNG")
    (pixels,) = decode([content.getvalue()])
    assert np.abs(pixels[..., 0] - deep / 257).max() <= 1


@pytest.mark.parametrize("size", [(200, 150), (37, 210), (48, 48), (20, 12), (1, 1), (3, 300)])
@pytest.mark.parametrize("side", [48, 16])
def test_resizes_as_pillow_bicubic(size: tuple[int, int], side: int) -> None:
    data = encoded("PNG", size=size)
    processor = ImageProcessor(side, mean=(0, 0, 0), std=(1, 1, 1))
    pixels, _ = processor([data])
    expected = np.asarray(by_pillow(data).resize((side, side), PIL.Image.Resampling.BICUBIC))
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 2.01


def test_normalises_as_torchvision() -> None:
    from torchvision.transforms.v2.functional import normalize

    plain, _ = ImageProcessor(16, mean=(0, 0, 0), std=(1, 1, 1))([PICTURES["PNG"]])
    pixels, _ = ImageProcessor(16, mean=MEAN, std=STD)([PICTURES["PNG"]])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, normalize(plain, MEAN, STD), atol=1e-5, rtol=0)


def test_pixels_do_not_depend_on_the_batch() -> None:
    processor = ImageProcessor(16, MEAN, STD)
    together, _ = processor([*PICTURES.values(), *BAD.values()])
    for row, data in zip(together, [*PICTURES.values(), *BAD.values()], strict=True):
        assert torch.equal(row, processor([data])[0][0])


@pytest.mark.parametrize("kind", BAD)
def test_bad_image_is_grey_and_leaves_the_others_alone(kind: str) -> None:
    processor = ImageProcessor(16, mean=(0, 0, 0), std=(1, 1, 1))
    pixels, decoded = processor([PICTURES["PNG"], BAD[kind], PICTURES["JPEG"]])
    assert decoded == [True, False, True]
    torch.testing.assert_close(pixels[1], torch.full((3, 16, 16), 128 / 255))
    assert torch.equal(pixels[2], processor([PICTURES["JPEG"]])[0][0])


@pytest.mark.parametrize("kind", [kind for kind in BAD if "too" in kind])
def test_huge_image_is_refused_before_it_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decoding, "_decode_with_dali", lambda data: [refuse() for _ in data])
    monkeypatch.setattr(decoding, "decode_with_pillow", refuse)
    assert decode([BAD[kind]]) == [None]
    with pytest.raises(UnusableImage, match="image too large"):
        check_image(BAD[kind])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "not an image"),
        ("text", "not an image"),
        ("JPEG cut short", "cannot be decoded"),
        ("PNG cut short", "cannot be decoded"),
    ],
)
def test_check_names_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(UnusableImage, match=reason):
        check_image(BAD[kind])


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "JPEG turned 3", "JPEG turned 6", "TIFF turned 6", "WebP animated, turned"]
)
def test_check_gives_height_and_width_of_the_upright_image(kind: str) -> None:
    width, height = by_pillow(PICTURES[kind]).size
    assert check_image(PICTURES[kind]) == (height, width)
    assert image_size(PICTURES[kind]) == (height, width)  # from the header alone


@pytest.mark.parametrize("kind", PICTURES)
def test_damaged_bytes_raise_nothing(kind: str) -> None:
    random = np.random.default_rng(0)
    damaged = []
    for _ in range(20):
        data = bytearray(PICTURES[kind])
        for place in random.integers(0, len(data), 5):
            data[place] = random.integers(0, 256)
        damaged.append(bytes(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(decode(damaged)) == 20


def test_extension_does_not_matter() -> None:
    """Bytes have no name: the format is what they begin with."""
    bomb = zipped_bomb()
    assert len(bomb) < 100_000
    assert decode([bomb, PICTURES["GIF"], PICTURES["WebP"]])[0] is None


def zipped_bomb() -> bytes:
    """A valid PNG of a few kilobytes that decodes to 400 MB."""
    content = io.BytesIO()
    PIL.Image.new("1", (9_999, 9_999)).save(content, "PNG")
    return content.getvalue()


def test_no_images() -> None:
    pixels, decoded = ImageProcessor(16, MEAN, STD)([])
    assert pixels.shape == (0, 3, 16, 16)
    assert decoded == []
