"""MM1's image preprocessing: the whole image resized to a square (bicubic, antialiased) and normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin


class MM1ImageProcessor(ImageProcessingMixin):
    """Pillow decodes and torch resizes, as in training, where only the decoder of JPEG and other lossy files differs.

    Args:
        image_size: side of the square, px.
        image_mean, image_std: of each channel, for pixels in 0..1.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as transformers declares it

    def __init__(
        self,
        image_size: int = 378,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Pixels of images.

        Args:
            images: one or several, PIL images or [H, W, 3] uint8 arrays.

        Returns:
            pixel_values [N, 3, image_size, image_size] float32.
        """
        if kwargs:
            raise TypeError(f"MM1ImageProcessor has no options {', '.join(sorted(kwargs))}")
        images = images if isinstance(images, (list, tuple)) else [images]
        square = torch.stack([self._resize(image) for image in images])
        # (x / 255 - mean) / std as one multiply and one subtraction.
        std = torch.tensor(self.image_std)
        scale, shift = (1 / (255 * std)).view(1, 3, 1, 1), (torch.tensor(self.image_mean) / std).view(1, 3, 1, 1)
        return BatchFeature({"pixel_values": square.float().mul_(scale).sub_(shift)}, tensor_type=return_tensors)

    preprocess = __call__

    def _resize(self, image: Any) -> Tensor:
        """[3, image_size, image_size] uint8."""
        if not isinstance(image, PIL.Image.Image):
            image = PIL.Image.fromarray(np.asarray(image))
        pixels = torch.from_numpy(np.array(PIL.ImageOps.exif_transpose(image).convert("RGB")))
        side = self.image_size
        batch = pixels.permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
        height, width = batch.shape[2:]
        if height > side and height - side > 2 * (width - side):  # then Pillow resizes the height before the width
            batch = torch.nn.functional.interpolate(batch, size=(side, width), mode="bicubic", antialias=True)
        return torch.nn.functional.interpolate(batch, size=(side, side), mode="bicubic", antialias=True)[0]


__all__ = ["MM1ImageProcessor"]
