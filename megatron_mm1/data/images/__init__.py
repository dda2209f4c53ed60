"""Encoded images -> the square pixels that the tower takes. Pixels never depend on the rest of a batch."""

from megatron_mm1.data.image_headers import UnusableImage
from megatron_mm1.data.images.decoding import check_image, decode
from megatron_mm1.data.images.preprocessing import ImageProcessor

__all__ = ["ImageProcessor", "UnusableImage", "check_image", "decode"]
