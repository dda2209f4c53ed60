"""The batch: one structure, computed once by the loader; nothing downstream recomputes any of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not trained: image slots, padding, an example's last position, untrained turns."""


class DeviceImages(Protocol):
    """Images that are decoded on the device that uses them."""

    def pixels(self, device: torch.device) -> Tensor:
        """[N, 3, H, W] float32, normalised."""
        ...


@dataclass(frozen=True)
class ImageGroup:
    """Images of one size; a tile of a larger image is an image here.

    Attributes:
        slots: [N, tokens_per_image] int64, flat indices into [B * S] where each image's tokens go.
        height, width: px.
        pixels: [N, 3, H, W] float32, normalised; or uint8, which `to` normalises by `normalization`; None on ranks that
            do not encode.
        tile_index: [N, 3] int64 (k, i, j), row i and column j of the tile in image k of its example, -1 and -1 for a
            whole image; None where no image is cut into tiles.
        encoded: in the place of pixels what `to` decodes.
    """

    slots: Tensor
    height: int
    width: int
    pixels: Tensor | None = None
    tile_index: Tensor | None = None
    normalization: Callable[[Tensor], Tensor] | None = None
    encoded: DeviceImages | None = None

    def without_pixels(self) -> "ImageGroup":
        return replace(self, pixels=None, normalization=None, encoded=None)

    def to(self, device: torch.device) -> "ImageGroup":
        """The same images on `device`, normalised."""
        pixels = self.pixels
        if self.encoded is not None:
            pixels = self.encoded.pixels(device)
        elif pixels is not None:
            pixels = pixels.to(device, non_blocking=True)
            pixels = pixels if self.normalization is None else self.normalization(pixels)
        return replace(
            self,
            slots=self.slots.to(device, non_blocking=True),
            pixels=pixels,
            tile_index=None if self.tile_index is None else self.tile_index.to(device, non_blocking=True),
            normalization=None,
            encoded=None,
        )


@dataclass(frozen=True)
class Boundaries:
    """Where the examples of a flattened microbatch begin, in the form of varlen attention kernels.

    Attributes:
        cu_seqlens: [segments + 1] int32, cumulative lengths over [B * S]; padding is a segment too.
        on_host: the same numbers.
        max_seqlen: the longest segment, positions.
    """

    cu_seqlens: Tensor
    on_host: tuple[int, ...]
    max_seqlen: int

    @classmethod
    def of(cls, segment_ids: Tensor) -> "Boundaries":
        """Boundaries of [B, S] segment ids, which must be on the host: a device would have to wait."""
        starts = torch.ones_like(segment_ids, dtype=torch.bool)  # each row starts a segment
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([segment_ids.numel()])]).int()
        return cls(cu_seqlens=cu_seqlens, on_host=tuple(cu_seqlens.tolist()), max_seqlen=int(cu_seqlens.diff().max()))


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch of B packed sequences of S positions.

    Attributes:
        tokens: [B, S] int64; each image's slots hold the image id, the tail holds the padding id.
        labels: [B, S] int64, the next token or IGNORE.
        position_ids: [B, S] int64, restarting at each example.
        segment_ids: [B, S] int32: 1, 2, .. per example and 0 for padding. Attention is causal within a segment.
        source_ids: [B, S] int64, the index of the position's source in the mixture.
        images: one group per image size; empty where the microbatch has no image.
        boundaries: the segments as cumulative lengths; filled in by `to`.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    source_ids: Tensor
    images: tuple[ImageGroup, ...] = ()
    boundaries: Boundaries | None = None

    @property
    def num_images(self) -> int:
        return sum(group.slots.shape[0] for group in self.images)

    def without_pixels(self) -> "PackedBatch":
        """The same batch for a stage that does not encode."""
        return replace(self, images=tuple(group.without_pixels() for group in self.images))

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on `device`; boundaries are computed here, while the batch is still on the host."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        boundaries = self.boundaries or Boundaries.of(self.segment_ids)
        return PackedBatch(
            tokens=move(self.tokens),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            segment_ids=move(self.segment_ids),
            source_ids=move(self.source_ids),
            images=tuple(group.to(device) for group in self.images),
            boundaries=replace(boundaries, cu_seqlens=move(boundaries.cu_seqlens)),
        )
