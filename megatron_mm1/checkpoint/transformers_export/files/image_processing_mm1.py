"""MM1's image preprocessing: squares or tiles of images (bicubic, antialiased), normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs

from megatron_mm1.data.images.geometry import Resize, mean_colour, tiles
from megatron_mm1.data.tiling import Kind, Tiling


class MM1ImageProcessor(ImageProcessingMixin):
    """Pillow decodes and torch resizes, as in training, where only the decoder of JPEG and other lossy files differs.

    Args:
        image_size: side of the squares, px.
        image_mean, image_std: of each channel, for pixels in 0..1.
        image_resize: how an image becomes a square: squash, shorter_side_crop or pad.
        image_tiling: how it becomes several: none, overview_and_crops or dynamic.
        min_image_tiles, max_image_tiles: of a dynamic grid, the overview not counted.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as transformers declares it
    valid_kwargs = ImagesKwargs  # which from_pretrained looks at where a pipeline gives it options

    def __init__(
        self,
        image_size: int = 378,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        image_resize: Resize = "squash",
        image_tiling: Kind = "none",
        min_image_tiles: int = 1,
        max_image_tiles: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_resize, self.image_tiling = image_resize, image_tiling
        self.min_image_tiles, self.max_image_tiles = min_image_tiles, max_image_tiles

    def __call__(
        self,
        images: Any,
        num_images: Sequence[int] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Pixels of images.

        Args:
            images: one or several, PIL images or [H, W, 3] uint8 arrays.
            num_images: of the prompt that each image belongs to, on which dynamic tiling depends; None: all are one's.

        Returns:
            pixel_values [tiles, 3, image_size, image_size] float32, those of all images one behind the other.
        """
        if kwargs:
            raise TypeError(f"MM1ImageProcessor has no options {', '.join(sorted(kwargs))}")
        images = images if isinstance(images, (list, tuple)) else [images]
        padding, pixels = mean_colour(self.image_mean), []
        for image, grid in zip(images, self.grids(images, num_images), strict=True):
            upright = PIL.ImageOps.exif_transpose(_pillow(image))
            rgb = torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
            pixels.append(tiles(rgb, grid=grid, tiling=self.tiling, mode=self.image_resize, padding=padding))
        # (x / 255 - mean) / std as one multiply and one subtraction.
        std = torch.tensor(self.image_std)
        scale, shift = (1 / (255 * std)).view(1, 3, 1, 1), (torch.tensor(self.image_mean) / std).view(1, 3, 1, 1)
        normal = torch.cat(pixels).float().mul_(scale).sub_(shift)
        return BatchFeature({"pixel_values": normal}, tensor_type=return_tensors)

    preprocess = __call__

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.image_tiling, self.image_size, self.min_image_tiles, self.max_image_tiles)

    def grids(self, images: Sequence[Any], num_images: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """(rows, columns) of the tiles that each image is cut into; arguments as of a call."""
        sizes = np.array([_size(_pillow(image)) for image in images])
        grids = self.tiling.grids(sizes, np.array(num_images or len(sizes)))
        return [(rows, columns) for rows, columns in grids.tolist()]


def _pillow(image: Any) -> PIL.Image.Image:
    return image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(np.asarray(image))


def _size(image: PIL.Image.Image) -> tuple[int, int]:
    """(height, width) of an image as it is shown, px."""
    is_turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    if image.format == "TIFF":  # Pillow has turned its size already
        is_turned = False
    return image.size if is_turned else image.size[::-1]


__all__ = ["MM1ImageProcessor"]
