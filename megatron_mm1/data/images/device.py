"""The whole preprocessing on the device that encodes: DALI decodes there (nvJPEG), torch resizes and normalises."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_mm1.data.batch import ImageGroup
from megatron_mm1.data.images.decoding import UnusableImage, decode, load_dali, suits_dali
from megatron_mm1.data.images.preprocessing import GREY, EncodedImage, ImageProcessor
from megatron_mm1.errors import UserError


def check_gpu_decoder() -> None:
    """Refuse `data.image_decoder: gpu` where it cannot run.

    Raises:
        UserError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("data.image_decoder is gpu, and this process sees no CUDA device: set data.image_decoder cpu")


@dataclass(frozen=True)
class DeviceProcessor:
    """Leaves images encoded, to be decoded by `ImageGroup.to`.

    Attributes:
        processor: the size, geometry and normalisation.
    """

    processor: ImageProcessor

    def fill(self, group: ImageGroup, images: Sequence[EncodedImage]) -> ImageGroup:
        """`group` with its images as they are stored."""
        return replace(group, encoded=EncodedGroup(self.processor, tuple(images)))


@dataclass(frozen=True)
class EncodedGroup:
    """Images on their way to the device."""

    processor: ImageProcessor
    images: tuple[EncodedImage, ...]

    def pixels(self, device: torch.device) -> Tensor:
        """[N, 3, image_size, image_size] float32, normalised; an image that cannot be decoded is grey."""
        size = self.processor.image_size
        views = []
        for image, rgb in zip(self.images, decode_on(device, [image.data for image in self.images]), strict=True):
            if rgb is None:
                tiles = self.processor.num_tiles(image)
                views.append(torch.full((tiles, 3, size, size), float(GREY), device=device))
            else:
                views.append(self.processor.view(rgb.permute(2, 0, 1).float(), image))
        return self.processor.normalization(torch.cat(views))


def decode_on(device: torch.device, images: Sequence[bytes | None]) -> list[Tensor | None]:
    """[H, W, 3] uint8 on `device` of each image, upright; None where it cannot be decoded.

    What DALI does not decode, and a batch with an image that fails, takes the way over the CPU.
    """
    on_device: dict[int, bytes] = {}
    for index, data in enumerate(images):
        try:
            if data is not None and suits_dali(data):
                on_device[index] = data
        except UnusableImage:
            continue
    decoded: dict[int, Tensor] = {}
    with suppress(RuntimeError, MemoryError):  # one bad image fails a batch without saying which
        decoded = dict(zip(on_device, _decode_batch(device, list(on_device.values())), strict=True))
    rest = [index for index in range(len(images)) if index not in decoded]
    for index, pixels in zip(rest, decode([images[index] for index in rest]), strict=True):
        if pixels is not None:
            decoded[index] = torch.from_numpy(pixels).to(device)
    return [decoded.get(index) for index in range(len(images))]


def _decode_batch(device: torch.device, images: Sequence[bytes]) -> list[Tensor]:
    if not images:
        return []
    dali = load_dali()
    buffers = dali.as_batch([np.frombuffer(data, np.uint8) for data in images])
    batch = dali.decoders.image(buffers, device="cpu" if device.type == "cpu" else "gpu")
    return [torch.from_dlpack(tensor).clone() for tensor in batch.tensors]  # the decoder reuses its own memory
