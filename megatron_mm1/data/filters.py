"""MM1's filters of interleaved documents [M]: which images and which documents are worth training on."""

from dataclasses import dataclass, replace

import xxhash

from megatron_mm1.data.image_headers import UnusableImage, image_size
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError

DECORATIONS = ("logo", "button", "icon", "plugin", "widget")


@dataclass(frozen=True, kw_only=True)
class InterleavedFilters:
    """An image that fails is left out of its document; then a document with too few or too many images is rejected.

    Attributes:
        min_images, max_images: of a document, those left out not counted.
        max_aspect_ratio: longer side over shorter.
        min_side, max_side: px.
        decorations: an image whose URL contains one of these, in upper or lower case, is a decoration.
        repeated_in_document: whether an image may stand in a document only once; the first is kept.
        max_repeats: how many times an image may occur over the corpus (`prepare` counts); None: any number.
    """

    min_images: int = 1
    max_images: int = 30
    max_aspect_ratio: float = 2.0
    min_side: int = 100
    max_side: int = 10_000
    decorations: tuple[str, ...] = DECORATIONS
    repeated_in_document: bool = True
    max_repeats: int | None = 10

    def __post_init__(self) -> None:
        if not 0 <= self.min_images <= self.max_images:
            raise UserError(f"filters: 0 <= min_images {self.min_images} <= max_images {self.max_images} does not hold")
        if not 0 <= self.min_side <= self.max_side:
            raise UserError(f"filters: 0 <= min_side {self.min_side} <= max_side {self.max_side} does not hold")
        if self.max_aspect_ratio < 1:
            raise UserError(f"filters: max_aspect_ratio {self.max_aspect_ratio} is below 1")
        if self.max_repeats is not None and self.max_repeats < 1:
            raise UserError(f"filters: max_repeats {self.max_repeats} is below 1")


def filter_document(document: Document, filters: InterleavedFilters) -> Document | Rejected:
    """`document` without the images that fail `filters`, whose reasons join its `dropped_images`."""
    kept: list[Text | Image | Control] = []
    dropped = []
    seen: set[int] = set()
    for part in document.parts:
        reason = _image_fault(part, filters, seen) if isinstance(part, Image) else None
        if reason is None:
            kept.append(part)
        else:
            dropped.append(reason)
    num_images = sum(isinstance(part, Image) for part in kept)
    if not filters.min_images <= num_images <= filters.max_images:
        reason = Reason.NO_IMAGES if num_images < filters.min_images else Reason.TOO_MANY_IMAGES
        return Rejected(document.key, reason, f"{num_images} images; left out: {', '.join(dropped) or 'none'}")
    return replace(document, parts=tuple(kept), dropped_images=(*document.dropped_images, *dropped))


def _image_fault(image: Image, filters: InterleavedFilters, seen: set[int]) -> Reason | None:
    """Why `image` is left out; None: it is kept, and is `seen` from here on."""
    url = image.url.lower()
    if any(word in url for word in filters.decorations):
        return Reason.DECORATION
    try:
        size = image_size(image.data)
    except UnusableImage as unusable:
        return Reason(unusable.kind)
    shorter, longer = sorted(size)
    if longer > filters.max_side:
        return Reason.IMAGE_TOO_LARGE
    if shorter < max(filters.min_side, 1):
        return Reason.IMAGE_TOO_SMALL
    if longer > filters.max_aspect_ratio * shorter:
        return Reason.ASPECT_RATIO
    if filters.repeated_in_document:
        digest = xxhash.xxh3_64_intdigest(image.data)
        if digest in seen:
            return Reason.REPEATED_IN_DOCUMENT
        seen.add(digest)
    return None
