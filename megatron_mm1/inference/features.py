"""Image tokens of prompts: each image is decoded and encoded once in the life of an engine."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mm1.config import MM1Config
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.inference.prompts import EncodedPrompt, ImageKey
from megatron_mm1.inference.replica import Replica
from megatron_mm1.parallel.device import device

_TOGETHER = 32
"""Images that go through the tower at a time."""


class ImageFeatures:
    """What tower and connector make of images, in host memory, by the images' content.

    Args:
        capacity_bytes: of features kept; the image whose use is longest ago goes first.
        together: images always encoded at a time, blank ones included, so that what an image becomes does not depend,
            to the last digit, on how many were new with it; None: as many as are new, up to 32.

    Attributes:
        num_encoded: images encoded so far.
    """

    def __init__(
        self, config: MM1Config, replica: Replica, *, capacity_bytes: int, together: int | None = None
    ) -> None:
        self._config, self._replica, self._together = config, replica, together
        self._processors: dict[int, ImageProcessor] = {}
        # Other stages keep None for an image: every stage must take and forget the same ones.
        self._kept: OrderedDict[ImageKey, Tensor | None] = OrderedDict()
        self._unusable: set[ImageKey] = set()
        each = config.model.connector.tokens_per_image * config.model.decoder.hidden_size
        self._capacity = capacity_bytes // (each * (2 if config.training.precision == "bf16" else 4))
        self.num_encoded = 0

    def of(self, prompts: Sequence[EncodedPrompt]) -> Mapping[ImageKey, Tensor | None]:
        """Image tokens [tokens_per_image, H] of the prompts' images, on the first stage (None on others); images that
        cannot be decoded are left out. Every rank of the replica calls it with the same prompts.
        """
        wanted = {key: data for prompt in prompts for key, data, _ in prompt.images}
        new: dict[int, list[ImageKey]] = {}
        for key in wanted:
            if key not in self._kept and key not in self._unusable:
                new.setdefault(key.image_size, []).append(key)
        for image_size, keys in new.items():
            step = self._together or _TOGETHER
            for start in range(0, len(keys), step):
                together = keys[start : start + step]
                self._encode(image_size, {key: wanted[key] for key in together})
        found = {}
        for key in wanted:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found

    def is_unusable(self, key: ImageKey) -> bool:
        """Whether the image was asked for and cannot be decoded."""
        return key in self._unusable

    def _encode(self, image_size: int, images: Mapping[ImageKey, bytes]) -> None:
        usable = torch.ones(len(images), dtype=torch.int32, device=device())
        pixels = torch.empty(0)
        if self._replica.is_first_stage:
            pixels, decoded = self._processor(image_size)(list(images.values()))
            usable.copy_(torch.tensor(decoded))
        good = self._replica.from_first_stage(usable).bool().cpu()
        self._unusable.update(key for key, is_good in zip(images, good.tolist(), strict=True) if not is_good)
        keys = [key for key, is_good in zip(images, good.tolist(), strict=True) if is_good]
        tokens: Sequence[Tensor | None] = [None] * len(keys)
        if self._replica.is_first_stage and keys:
            blank = pixels.new_zeros((max(0, (self._together or 0) - len(keys)), *pixels.shape[1:]))
            encoded = self._replica.first.encode(torch.cat([pixels[good], blank]).to(device()))
            tokens = [one.clone() for one in encoded[: len(keys)].cpu()]  # by itself, so that each can be forgotten
        self._kept.update(zip(keys, tokens, strict=True))
        self.num_encoded += len(keys)

    def _processor(self, image_size: int) -> ImageProcessor:
        if image_size not in self._processors:
            vision = replace(self._config.model.vision, image_size=image_size)
            model = replace(self._config.model, vision=vision)
            self._processors[image_size] = ImageProcessor.of(replace(self._config, model=model))
        return self._processors[image_size]
