"""Encoded images -> RGB pixels, by DALI on the CPU: it decodes to the same bytes as Pillow, several times faster."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
import PIL.Image
import PIL.ImageOps

from megatron_mm1.data.image_headers import UnusableImage, image_size, open_header

_DALI_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"}


def check_image(data: bytes) -> tuple[int, int]:
    """(height, width) in px of the upright image (EXIF), which training will be able to decode.

    Raises:
        UnusableImage: not an image, too large, or damaged.
    """
    size = image_size(data)
    if decode_with_pillow(data) is None and decode([data])[0] is None:  # either will do, and Pillow is at hand
        raise UnusableImage("image cannot be decoded")
    return size


def decode(images: Sequence[bytes | None]) -> list[np.ndarray | None]:
    """[H, W, 3] uint8 RGB of each image, turned as its EXIF orientation says; None where it cannot be decoded."""
    decoded: list[np.ndarray | None] = [None] * len(images)
    for_dali: dict[int, bytes] = {}
    for index, data in enumerate(images):
        if data is None:
            continue
        try:
            if suits_dali(data):
                for_dali[index] = data
            else:
                decoded[index] = decode_with_pillow(data)
        except UnusableImage:
            continue
    for index, pixels in zip(for_dali, _decode_with_dali(list(for_dali.values())), strict=True):
        decoded[index] = pixels
    return decoded


def suits_dali(data: bytes) -> bool:
    """Whether DALI decodes it as Pillow does: a known format, and a single picture.

    Raises:
        UnusableImage: not an image, or too large to decode.
    """
    with open_header(data) as image:
        return image.format in _DALI_FORMATS and not _has_frames(image)


def _has_frames(image: PIL.Image.Image) -> bool:
    """Whether it is an animation or has pages (Pillow gives the first); counting them may read damaged bytes."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # see open_header
        return True


@cache
def load_dali() -> ModuleType:
    """DALI's dynamic mode, imported where it is used: it takes seconds and 660 MB, and forking after it hangs."""
    import nvidia.dali.experimental.dynamic as dali

    return dali


def _decode_with_dali(images: list[bytes]) -> list[np.ndarray | None]:
    """One bad image fails a whole DALI batch without saying which, so then they are decoded one by one."""
    if not images:
        return []
    try:
        dali = load_dali()
        buffers = dali.as_batch([np.frombuffer(data, np.uint8) for data in images])
        batch = dali.decoders.image(buffers, device="cpu")
        return [np.array(tensor) for tensor in batch.tensors]  # the decoder reuses its own memory
    except (RuntimeError, MemoryError):
        if len(images) > 1:
            return [image for data in images for image in _decode_with_dali([data])]
        return [decode_with_pillow(images[0])]


def decode_with_pillow(data: bytes) -> np.ndarray | None:
    """[H, W, 3] uint8 RGB, upright; None where it cannot be decoded."""
    try:
        with open_header(data) as image:
            return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:  # see open_header
        return None
