"""Random resized crops, a pure function of the seed, the sequence and the image's number in it."""

import hashlib
import math
from dataclasses import dataclass

_RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop, as torchvision's RandomResizedCrop and open_clip draw it."""
_ATTEMPTS = 10


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of the image in place of the whole (Inception's augmentation, with torchvision's distribution).

    Attributes:
        min_area, max_area: share of the image's area, uniform between them.
        seed: of the run's data.
    """

    min_area: float
    max_area: float
    seed: int

    def box(self, height: int, width: int, *, sequence: int, image: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop, px.

        Args:
            height, width: of the image, px.
            sequence: its place in the order of training.
            image: its number in the sequence.
        """
        for attempt in range(_ATTEMPTS):
            area, ratio, down, right = _uniform(f"{self.seed}/crop/{sequence}/{image}/{attempt}")
            pixels = height * width * (self.min_area + (self.max_area - self.min_area) * area)
            low, high = map(math.log, _RATIO)
            shape = math.exp(low + (high - low) * ratio)
            w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if 0 < w <= width and 0 < h <= height:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        return _central(height, width)


def _central(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest box in the middle whose shape is legal."""
    low, high = _RATIO
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniform(key: str) -> list[float]:
    """Four numbers in [0, 1) that `key` chooses."""
    digest = hashlib.sha256(key.encode()).digest()
    return [(int.from_bytes(digest[n : n + 8], "little") >> 11) / 2**53 for n in range(0, 32, 8)]
