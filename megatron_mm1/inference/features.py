"""Image tokens of prompts: each image is decoded and encoded once in the life of an engine."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mm1.config import MM1Config
from megatron_mm1.data.image_tokens import tiling_of
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.images.preprocessing import EncodedImage
from megatron_mm1.inference.prompts import EncodedPrompt, ImageKey
from megatron_mm1.inference.replica import Replica
from megatron_mm1.parallel.device import device

_TOGETHER = 32
"""Images, or tiles of them, that go through the tower at a time."""


class ImageFeatures:
    """What tower and connector make of images, in host memory, by the images' content.

    Args:
        capacity_bytes: of features kept; the image whose use is longest ago goes first.
        together: images (tiles) always encoded at a time, blank ones included, so that what an image becomes does not
            depend, to the last digit, on how many were new with it; None: as many as are new, up to 32.

    Attributes:
        num_encoded: images encoded so far, an image of several tiles once.
    """

    def __init__(
        self, config: MM1Config, replica: Replica, *, capacity_bytes: int, together: int | None = None
    ) -> None:
        self._config, self._replica, self._together = config, replica, together
        self._processors: dict[int, ImageProcessor] = {}
        # Other stages keep None for an image: every stage must take and forget the same ones.
        self._kept: OrderedDict[ImageKey, Tensor | None] = OrderedDict()
        self._unusable: set[ImageKey] = set()
        self._tiling = tiling_of(config)
        self._tiles_kept = 0
        each = config.model.connector.tokens_per_image * config.model.decoder.hidden_size
        self._capacity = capacity_bytes // (each * (2 if config.training.precision == "bf16" else 4))
        self.num_encoded = 0

    def of(self, prompts: Sequence[EncodedPrompt]) -> Mapping[ImageKey, Tensor | None]:
        """Image tokens [tiles, tokens_per_image, H] of the prompts' images, on the first stage (None on others).

        Images that cannot be decoded are left out. Every rank of the replica calls it with the same prompts.
        """
        wanted = {key: data for prompt in prompts for key, data, _ in prompt.images}
        new: dict[int, list[ImageKey]] = {}
        for key in wanted:
            if key not in self._kept and key not in self._unusable:
                new.setdefault(key.image_size, []).append(key)
        for image_size, keys in new.items():
            for together in self._batches(keys):
                self._encode(image_size, {key: wanted[key] for key in together})
        found = {}
        for key in wanted:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
        while self._tiles_kept > self._capacity:
            key, _ = self._kept.popitem(last=False)
            self._tiles_kept -= self._num_tiles(key)
        return found

    def _num_tiles(self, key: ImageKey) -> int:
        return len(self._tiling.places(key.grid))

    def _batches(self, keys: Sequence[ImageKey]) -> Iterator[list[ImageKey]]:
        """Images that are decoded together: of as many tiles as are encoded at a time, or one alone."""
        batch: list[ImageKey] = []
        tiles = 0
        for key in keys:
            tiles += self._num_tiles(key)
            if batch and tiles > self._at_a_time:
                yield batch
                batch, tiles = [], self._num_tiles(key)
            batch.append(key)
        if batch:
            yield batch

    @property
    def _at_a_time(self) -> int:
        return self._together or _TOGETHER

    def is_unusable(self, key: ImageKey) -> bool:
        """Whether the image was asked for and cannot be decoded."""
        return key in self._unusable

    def _encode(self, image_size: int, images: Mapping[ImageKey, bytes]) -> None:
        usable = torch.ones(len(images), dtype=torch.int32, device=device())
        pixels = torch.empty(0)
        if self._replica.is_first_stage:
            processor = self._processor(image_size)
            pixels, decoded = processor.tiles([EncodedImage(data, key.grid) for key, data in images.items()])
            pixels = processor.normalization(pixels)
            usable.copy_(torch.tensor(decoded))
        good = self._replica.from_first_stage(usable).bool().cpu()
        self._unusable.update(key for key, is_good in zip(images, good.tolist(), strict=True) if not is_good)
        keys = [key for key, is_good in zip(images, good.tolist(), strict=True) if is_good]
        tokens: Sequence[Tensor | None] = [None] * len(keys)
        if self._replica.is_first_stage and keys:
            of_image = torch.tensor([self._num_tiles(key) for key in images])
            encoded = self._encode_tiles(pixels[good.repeat_interleave(of_image)])
            tokens = [one.clone() for one in encoded.split(of_image[good].tolist())]  # so that each can be forgotten
        self._kept.update(zip(keys, tokens, strict=True))
        self._tiles_kept += sum(map(self._num_tiles, keys))
        self.num_encoded += len(keys)

    def _encode_tiles(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] normalised -> [N, tokens_per_image, hidden_size] in host memory."""
        encoded = []
        for some in pixels.split(self._at_a_time):
            blank = some.new_zeros((max(0, (self._together or 0) - len(some)), *some.shape[1:]))
            encoded.append(self._replica.first.encode(torch.cat([some, blank]).to(device()))[: len(some)].cpu())
        return torch.cat(encoded)

    def _processor(self, image_size: int) -> ImageProcessor:
        if image_size not in self._processors:
            vision = replace(self._config.model.vision, image_size=image_size)
            model = replace(self._config.model, vision=vision)
            self._processors[image_size] = ImageProcessor.of(replace(self._config, model=model))
        return self._processors[image_size]
