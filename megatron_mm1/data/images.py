"""Encoded images -> normalised square pixels.

DALI decodes (CPU), torch resizes: DALI's JPEG decoder is several times faster than Pillow's, and torch's antialiased
uint8 bicubic agrees with Pillow's to 2 of 255 where DALI's own does not. Pixels never depend on the rest of a batch.
"""

import io
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torch.nn import functional

MAX_SIDE = 10_000
"""px [M]; a longer side is refused from the header, before anything is decoded."""
MAX_PIXELS = 64_000_000
"""Decoded, that is 192 MB."""
_DALI_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"}
_GREY = 128


class UnusableImage(ValueError):
    """An image that is not decoded.

    Attributes:
        kind: the reason, the same for every image refused for it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(kind)


def _open_header(data: bytes) -> PIL.Image.Image:
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


def check_image(data: bytes) -> tuple[int, int]:
    """(height, width) in px as the file's header has them, of an image that training will be able to decode.

    Raises:
        UnusableImage: not an image, too large, or damaged.
    """
    with _open_header(data) as image:
        height, width = image.height, image.width
    if _decode_with_pillow(data) is None and decode([data])[0] is None:  # either will do, and Pillow is at hand
        raise UnusableImage("image cannot be decoded")
    return height, width


class ImageProcessor:
    """CLIP's "squash" preprocessing: the whole image resized to a square (bicubic, antialiased) and normalised.

    Args:
        image_size: side of the square, px.
        mean, std: of each channel, for pixels in 0..1.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size = image_size
        # (x / 255 - mean) / std as one multiply and one subtraction.
        self._scale = (1 / (255 * torch.tensor(std))).view(1, 3, 1, 1)
        self._shift = (torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1)

    def __call__(self, images: Sequence[bytes]) -> tuple[Tensor, list[bool]]:
        """Decode, resize and normalise.

        Returns:
            [N, 3, image_size, image_size] float32, and whether each image could be decoded; one that could not is grey.
        """
        decoded = decode(images)
        square = torch.full((len(images), 3, self.image_size, self.image_size), _GREY, dtype=torch.uint8)
        for index, image in enumerate(decoded):
            if image is not None:
                square[index] = self.resize(torch.from_numpy(image))
        return square.float().mul_(self._scale).sub_(self._shift), [image is not None for image in decoded]

    def resize(self, image: Tensor) -> Tensor:
        """[H, W, 3] uint8 -> [3, image_size, image_size] uint8."""
        size = (self.image_size, self.image_size)
        batch = image.permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W], channels last in memory
        return functional.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]


def decode(images: Sequence[bytes]) -> list[np.ndarray | None]:
    """[H, W, 3] uint8 RGB of each image, turned as its EXIF orientation says; None where it cannot be decoded."""
    decoded: list[np.ndarray | None] = [None] * len(images)
    for_dali = []
    for index, data in enumerate(images):
        try:
            with _open_header(data) as image:
                if image.format in _DALI_FORMATS and not _has_frames(image):
                    for_dali.append(index)
                else:
                    decoded[index] = _decode_with_pillow(data)
        except UnusableImage:
            continue
    by_dali = _decode_with_dali([images[index] for index in for_dali])
    for index, pixels in zip(for_dali, by_dali, strict=True):
        decoded[index] = pixels
    return decoded


def _has_frames(image: PIL.Image.Image) -> bool:
    """Whether it is an animation or has pages (Pillow gives the first); counting them may read damaged bytes."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # see _open_header
        return True


@cache
def _dali() -> ModuleType:
    """DALI's dynamic mode, imported where it is used: it takes seconds and 660 MB, and forking after it hangs."""
    import nvidia.dali.experimental.dynamic as dali

    return dali


def _decode_with_dali(images: list[bytes]) -> list[np.ndarray | None]:
    """One bad image fails a whole DALI batch without saying which, so then they are decoded one by one."""
    if not images:
        return []
    try:
        dali = _dali()
        buffers = dali.as_batch([np.frombuffer(data, np.uint8) for data in images])
        batch = dali.decoders.image(buffers, device="cpu")
        return [np.array(tensor) for tensor in batch.tensors]  # the decoder reuses its own memory
    except (RuntimeError, MemoryError):
        if len(images) > 1:
            return [image for data in images for image in _decode_with_dali([data])]
        return [_decode_with_pillow(images[0])]


def _decode_with_pillow(data: bytes) -> np.ndarray | None:
    try:
        with _open_header(data) as image:
            return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:  # see _open_header
        return None
