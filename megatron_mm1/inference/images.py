"""Image files as parts of prompts."""

from pathlib import Path

from megatron_mm1.data.images import UnusableImage, check_image
from megatron_mm1.data.records import Image
from megatron_mm1.errors import UserError


def read_image(path: Path) -> Image:
    """The image in a file.

    Raises:
        UserError: it cannot be read, or is no image that the model could see.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error.strerror}") from error
    try:
        check_image(data)
    except UnusableImage as error:
        raise UserError(f"cannot use image {path}: {error.kind}") from error
    return Image(data)
