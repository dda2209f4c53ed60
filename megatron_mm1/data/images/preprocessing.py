"""Encoded images -> pixels as the tower takes them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_mm1.config.schema import MM1Config
from megatron_mm1.data.batch import ImageGroup
from megatron_mm1.data.image_tokens import tiling_of
from megatron_mm1.data.images.decoding import decode
from megatron_mm1.data.images.geometry import Resize, mean_colour, square, tiles
from megatron_mm1.data.tiling import Tiling

GREY = 128
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalization:
    """(pixel / 255 - mean) / std of each channel, as one multiplication and one subtraction."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> float32, on the same device; the same bits whether N images go together or alone."""
        scale, shift = self._factors(pixels.device)
        normal = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
        for image, target in zip(pixels, normal, strict=True) if pixels.device.type == "cpu" else [(pixels, normal)]:
            target.copy_(image).mul_(scale).sub_(shift)  # on a CPU one image at a time stays in the cache
        return normal

    def _factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        scale, shift = (1 / (255 * std)).view(3, 1, 1), (mean / std).view(3, 1, 1)
        # A copy that blocks would let the host wait for all that the device has to do before it.
        return scale.to(device, non_blocking=True), shift.to(device, non_blocking=True)


@dataclass(frozen=True)
class EncodedImage:
    """An image and what is to become of it.

    Attributes:
        data: the file's bytes; None where the stored ones are damaged.
        grid: (rows, columns) of its tiles.
        crop: gives the box (top, left, height, width) that takes the place of the whole, from (height, width), px.
    """

    data: bytes | None
    grid: tuple[int, int] = (1, 1)
    crop: Callable[[int, int], tuple[int, int, int, int]] | None = None


class ImageProcessor:
    """CLIP's preprocessing, and the tiles of images of high resolution.

    Args:
        image_size: side of the squares, px.
        mean, std: of each channel, for pixels in 0..1.
        mode: how an image becomes a square, see `geometry.square`.
        tiling: how it becomes several; its side is `image_size`. None: it does not.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        mode: Resize = "squash",
        tiling: Tiling | None = None,
    ) -> None:
        self.image_size, self.mode = image_size, mode
        self.tiling = tiling or Tiling(side=image_size)
        self.normalization = Normalization(tuple(mean), tuple(std))
        self._padding = mean_colour(mean)

    @staticmethod
    def of(config: MM1Config) -> "ImageProcessor":
        vision = config.model.vision
        return ImageProcessor(
            vision.image_size,
            vision.image_mean,
            vision.image_std,
            mode=vision.image_resize,
            tiling=tiling_of(config),
        )

    def __call__(self, images: Sequence[bytes]) -> tuple[Tensor, list[bool]]:
        """Decode, resize and normalise whole images.

        Returns:
            [N, 3, image_size, image_size] float32, and whether each image could be decoded; one that could not is grey.
        """
        decoded = decode(images)
        squares = torch.full((len(images), 3, self.image_size, self.image_size), GREY, dtype=torch.uint8)
        for target, image in zip(squares, decoded, strict=True):
            if image is not None:
                rgb = _channels_first(image)
                target.copy_(square(rgb, side=self.image_size, mode=self.mode, padding=self._padding))
        return self.normalization(squares), [image is not None for image in decoded]

    def fill(self, group: ImageGroup, images: Sequence[EncodedImage]) -> ImageGroup:
        """`group` with the pixels of its images, to be normalised where they are used: bytes travel, not floats."""
        pixels, decoded = self.tiles(images)
        for image, is_decoded in zip(images, decoded, strict=True):
            if not is_decoded and image.data is not None:
                _log.warning(
                    "an image of %d bytes cannot be decoded: the model sees grey in its place", len(image.data)
                )
        return replace(group, pixels=pixels, normalization=self.normalization)

    def tiles(self, images: Sequence[EncodedImage]) -> tuple[Tensor, list[bool]]:
        """Decode, cut and resize.

        Returns:
            [N, 3, image_size, image_size] uint8, the tiles of all images one behind the other, and whether each image
            could be decoded; the tiles of one that could not are grey.
        """
        decoded = decode([image.data for image in images])
        counts = [self.num_tiles(image) for image in images]
        pixels = torch.full((sum(counts), 3, self.image_size, self.image_size), GREY, dtype=torch.uint8)
        for target, image, rgb in zip(pixels.split(counts) if counts else (), images, decoded, strict=True):
            if rgb is not None:
                target.copy_(self.view(_channels_first(rgb), image))
        return pixels, [rgb is not None for rgb in decoded]

    def view(self, rgb: Tensor, image: EncodedImage) -> Tensor:
        """The tiles of a decoded image: [3, H, W] uint8, or float32 in 0..255 -> [tiles, 3, image_size, image_size]."""
        if image.crop is not None:
            top, left, height, width = image.crop(*rgb.shape[1:])
            rgb = rgb[:, top : top + height, left : left + width]
        padding = self._padding.to(rgb.device, non_blocking=True)
        return tiles(rgb, grid=image.grid, tiling=self.tiling, mode=self.mode, padding=padding)

    def num_tiles(self, image: EncodedImage) -> int:
        return len(self.tiling.places(image.grid))


def _channels_first(image: np.ndarray) -> Tensor:
    """[H, W, 3] -> [3, H, W], still channels last in memory: torch resizes that faster."""
    return torch.from_numpy(image).permute(2, 0, 1)
