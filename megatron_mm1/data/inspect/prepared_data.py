"""What a prepared data set holds, in numbers."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from megatron_mm1.data.arrays import count_values
from megatron_mm1.data.prepared import IMAGE_COLUMNS
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.storage import Range, open_storage

_HEIGHT, _WIDTH, _CHECKSUM = (IMAGE_COLUMNS.index(name) for name in ("height", "width", "checksum"))
_BLOCK = 1 << 20
"""Documents looked at together."""
_LENGTHS = [2**power for power in range(4, 17)]
_IMAGES = [1, 2, 3, 4, 8, 16, 30]
_SIDES = [64, 128, 256, 512, 1024, 2048, 4096]
_BAR = 40
_INT32, _INT64 = 4, 8


def describe(path: str | Path) -> list[str]:
    """Lines about the prepared data set at `path`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    source = IndexedSource(path, tokenizer_fingerprint=None)
    manifest = source.manifest
    lines = [f"{path}: {len(manifest.parts)} parts, tokenizer {manifest.tokenizer[:12]}.."]
    lines += [f"  {name}: {count:,}" for name, count in manifest.counts.items()]
    lines.append(f"  records: {manifest.records['read']:,} read, {manifest.records['written']:,} written")
    lines += [f"    left out, {reason}: {count:,}" for reason, count in manifest.records["rejected"].items()]
    lines += [f"  images left out, {reason}: {count:,}" for reason, count in manifest.images["dropped"].items()]
    duplicates = (duplicate_documents(source), duplicate_images(source))
    lines.append(f"  exact duplicates: {duplicates[0]:,} documents, {duplicates[1]:,} images")
    tokens, images = np.zeros(len(_LENGTHS) + 1, np.int64), np.zeros(len(_IMAGES) + 1, np.int64)
    for documents in _blocks(len(source)):
        tokens += _counts(source.num_tokens(documents), _LENGTHS)
        images += _counts(source.num_images(documents), _IMAGES)
    lines += ["  stored tokens of a document:", *_histogram(tokens, _LENGTHS)]
    lines += ["  images of a document:", *_histogram(images, _IMAGES)]
    sides = np.zeros(len(_SIDES) + 1, np.int64)
    for rows in _image_rows(source):
        sides += _counts(np.maximum(rows[:, _HEIGHT], rows[:, _WIDTH]), _SIDES)
    return [*lines, "  longer side of an image, px:", *_histogram(sides, _SIDES)] if sides.any() else lines


def duplicate_images(source: IndexedSource) -> int:
    """Images whose bytes have occurred before in the data set (by their 64-bit checksums)."""
    return _repeats(lambda: (rows[:, _CHECKSUM] for rows in _image_rows(source)), source.manifest.counts["images"])


def duplicate_documents(source: IndexedSource) -> int:
    """Documents whose tokens and images have all occurred before, as those of one document (by 64-bit hashes)."""
    return _repeats(lambda: _document_hashes(source), len(source))


def _document_hashes(source: IndexedSource) -> Iterator[np.ndarray]:
    """Of tokens and the stored checksums of images, whose bytes are not read."""
    storage = open_storage(source.path)
    for number, part in enumerate(source.manifest.parts):
        starts = storage.array(f"{part.name}/documents.npy", part.files["documents.npy"])[:, :2]
        checksums = source.image_rows(number)[:, _CHECKSUM]
        for documents in _blocks(part.documents, size=4096):
            bounds = np.asarray(starts[documents[0] : documents[-1] + 2])
            (first, image), (last, last_image) = bounds[0].tolist(), bounds[-1].tolist()
            (tokens,) = storage.read([Range(f"{part.name}/tokens.bin", _INT32 * first, _INT32 * last)])
            images = np.ascontiguousarray(checksums[image:last_image]).tobytes()
            hashes = []
            for (token, image), (stop, image_stop) in pairwise(((bounds - bounds[0]) * (_INT32, _INT64)).tolist()):
                state = xxhash.xxh3_64(tokens[token:stop])
                state.update(images[image:image_stop])
                hashes.append(state.intdigest())
            yield np.array(hashes, np.uint64).view(np.int64)


def _repeats(hashes: Callable[[], Iterator[np.ndarray]], total: int) -> int:
    """How many of `total` hashes, of which `hashes()` starts a pass, are not the first of their value."""
    return total - sum(len(values) for values, _ in count_values(hashes, total))


def _image_rows(source: IndexedSource) -> Iterator[np.ndarray]:
    return (source.image_rows(part) for part in range(len(source.manifest.parts)))


def _blocks(count: int, size: int = _BLOCK) -> Iterator[np.ndarray]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _counts(values: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """How many values lie below each bound and not below the one before; last, those above all."""
    return np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1)


def _histogram(counts: np.ndarray, bounds: Sequence[int]) -> list[str]:
    """A line with a bar for each class, without empty ones at the ends."""
    names = [f"< {bound:,}" for bound in bounds] + [f">= {bounds[-1]:,}"]
    filled = np.flatnonzero(counts)
    lines = []
    for place in range(filled[0], filled[-1] + 1) if len(filled) else ():
        bar = "#" * round(_BAR * counts[place] / counts.max())
        lines.append(f"    {names[place]:>9} {counts[place]:>13,} {bar}".rstrip())
    return lines
