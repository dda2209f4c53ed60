"""What an image's header says, by Pillow; nothing is decoded."""

import io
import warnings

import PIL.Image

MAX_SIDE = 10_000
"""px [M]; a longer side is refused from the header, before anything is decoded."""
MAX_PIXELS = 64_000_000
"""Decoded, that is 192 MB."""
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""EXIF orientations whose upright image has height and width exchanged."""


class UnusableImage(ValueError):
    """An image that is not decoded.

    Attributes:
        kind: the reason, the same for every image refused for it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(kind)


def open_header(data: bytes) -> PIL.Image.Image:
    """The image with nothing decoded yet.

    Raises:
        UnusableImage: not an image, or too large to decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, higher limits
            image = PIL.Image.open(io.BytesIO(data))
    except PIL.Image.DecompressionBombError:
        raise UnusableImage("image too large") from None
    except Exception:  # Pillow's plugins raise anything from OSError to struct.error on bad bytes
        raise UnusableImage("not an image") from None
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise UnusableImage("image too large")
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in px of the upright image (EXIF).

    Raises:
        UnusableImage: not an image, or too large to decode.
    """
    with open_header(data) as image:
        try:
            # Pillow has turned a TIFF's size already.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _TURNED
        except Exception:  # see open_header
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)
