"""One part of a data set: records of its shards, checked, filtered and written."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_mm1.data.files import new_folder
from megatron_mm1.data.filters import InterleavedFilters, filter_document
from megatron_mm1.data.image_headers import UnusableImage, image_size
from megatron_mm1.data.images import check_image
from megatron_mm1.data.prepared import QUARANTINE
from megatron_mm1.data.readers import Reader, Shard
from megatron_mm1.data.records import Document, Image, Reason, Rejected, Text
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.data.writer import PartWriter, write_hashed

SUMMARY = "summary.json"
_BATCH = 1 << 20
"""Characters of text that are tokenized at once, and bytes of images that wait for it, divided by 64."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What a record must pass.

    Attributes:
        filters: of interleaved documents; None: no filter.
        image_check: "decode" every image, or read its "header" only, which is several times faster and leaves damage
            behind it to be found in training.
    """

    filters: InterleavedFilters | None = None
    image_check: Literal["decode", "header"] = "decode"

    def __call__(self, document: Document) -> tuple[Document, list[tuple[int, int]]] | Rejected:
        """The document without what cannot be used, and (height, width) of its images.

        In a document that interleaves images with text a bad image is left out; a pair of image and text is rejected.
        """
        if self.filters is not None:
            filtered = filter_document(document, self.filters)
            if isinstance(filtered, Rejected):
                return filtered
            document = filtered
        num_images = sum(isinstance(part, Image) for part in document.parts)
        if not num_images:
            return document, []
        interleaved = self.filters is not None or num_images > 1
        parts, sizes, dropped = [], [], []
        for part in document.parts:
            if isinstance(part, Image):
                size = self._size(part)
                if isinstance(size, Reason):
                    if not interleaved:
                        return Rejected(document.key, size)
                    dropped.append(size)
                    continue
                sizes.append(size)
            parts.append(part)
        if dropped and len(sizes) < (1 if self.filters is None else self.filters.min_images):
            return Rejected(document.key, dropped[0], f"{len(dropped)} of {num_images} images: {', '.join(dropped)}")
        return replace(document, parts=tuple(parts), dropped_images=(*document.dropped_images, *dropped)), sizes

    def _size(self, image: Image) -> tuple[int, int] | Reason:
        try:
            return image_size(image.data) if self.image_check == "header" else check_image(image.data)
        except UnusableImage as unusable:
            return Reason(unusable.kind)


@dataclass
class Summary:
    """What became of the records of a part.

    Attributes:
        read: records; the sum of the documents written and of `rejected`.
        images_seen: in the documents written; the sum of the images written and of `dropped`.
    """

    read: int = 0
    images_seen: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    files: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Nothing is lost without a reason."""
        written, images = self.counts["documents"], self.counts["images"]
        if self.read != written + self.rejected.total() or self.images_seen != images + self.dropped.total():
            raise AssertionError(
                f"{self.read} records read, {written} written, {self.rejected.total()} rejected; {self.images_seen} "
                f"images seen, {images} written, {self.dropped.total()} left out"
            )

    def save(self, folder: Path) -> None:
        write_hashed(folder / SUMMARY, json.dumps(vars(self)).encode())

    @staticmethod
    def load(folder: Path) -> "Summary":
        values = json.loads((folder / SUMMARY).read_text())
        return Summary(**values | {name: Counter(values[name]) for name in ("rejected", "dropped", "counts")})


def write_part(
    folder: Path,
    reader: Reader,
    shards: Sequence[Shard],
    *,
    tokenizer: Tokenizer,
    checks: Checks,
    done: Callable[[int], None],
) -> None:
    """Write the documents of `shards` to the new folder, with its summary and quarantine; all of it appears at once.

    Args:
        done: told the bytes of each shard that has been read.
    """
    with new_folder(folder) as unfinished:
        writer, summary = PartWriter(unfinished, tokenizer), Summary()
        waiting: list[tuple[Document, Sequence[tuple[int, int]]]] = []
        weight = 0
        with (unfinished / QUARANTINE).open("w", encoding="utf-8") as quarantine:
            for shard, record in _records(reader, shards, done):
                summary.read += 1
                checked = record if isinstance(record, Rejected) else checks(record)
                if isinstance(checked, Rejected):
                    summary.rejected[checked.reason] += 1
                    quarantine.write(quarantine_line(checked, shard=shard.name))
                    continue
                document, sizes = checked
                summary.images_seen += len(sizes) + len(document.dropped_images)
                summary.dropped.update(document.dropped_images)
                waiting.append((document, sizes))
                weight += _weight(document)
                if weight > _BATCH:
                    writer.add(waiting)
                    waiting, weight = [], 0
            writer.add(waiting)
        summary.files = writer.close()
        summary.counts = writer.counts
        summary.check()
        summary.save(unfinished)
        _flush(unfinished)


def _records(
    reader: Reader, shards: Sequence[Shard], done: Callable[[int], None]
) -> Iterator[tuple[Shard, Document | Rejected]]:
    for shard in shards:
        for record in reader.read(shard):
            yield shard, record
        done(shard.size)


def quarantine_line(rejected: Rejected, *, shard: str) -> str:
    """A line of quarantine.jsonl."""
    return json.dumps(vars(rejected) | {"shard": shard}) + "\n"


def _weight(document: Document) -> int:
    weight = 1
    for part in document.parts:
        if isinstance(part, Text):
            weight += len(part.text)
        elif isinstance(part, Image):
            weight += len(part.data) // 64
    return weight


def _flush(folder: Path) -> None:
    """To the disk, so that a part that is there is whole even if the machine fails."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
