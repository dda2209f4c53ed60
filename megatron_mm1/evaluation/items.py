"""What a task asks: items made of text and of images that stay in their files until they are shown to a model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
import xxhash

from megatron_mm1.data.image_headers import UnusableImage, open_header
from megatron_mm1.data.records import Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError


@dataclass(frozen=True)
class ImageFile:
    """An image in a file. (`data.records.Image` holds the bytes; those of all items would not fit in memory.)

    Attributes:
        path: of the image, or of the Parquet table that holds it.
        row, column: where in the table; None: the file is the image.
        high_resolution: whether it is shown in the high resolution, where an evaluation has two.
    """

    path: Path
    row: int | None = None
    column: str = ""
    high_resolution: bool = True

    @property
    def place(self) -> tuple[Path, int | None, str]:
        """Which image this is, however it is shown."""
        return self.path, self.row, self.column

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}, row {self.row}, column {self.column}"

    @classmethod
    def parse(cls, text: str) -> "ImageFile":
        """The inverse of `str`, which evaluations write down."""
        place = re.fullmatch(r"(.+), row (\d+), column (.*)", text, re.DOTALL)
        return cls(Path(text)) if place is None else cls(Path(place[1]), int(place[2]), place[3])

    def read(self) -> Image:
        """The image's bytes, of which the header has been looked at.

        Raises:
            UserError: there is no such file, or no image in it.
        """
        try:
            data = self.path.read_bytes() if self.row is None else _cell(self.path, self.row, self.column)
            open_header(data).close()
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = error if isinstance(error, UnusableImage) else "cannot be read"
            raise UserError(f"image {self}: {reason}; put it there again or leave its item out") from error
        return Image(data)


def _cell(path: Path, row: int, column: str) -> bytes:
    """Encoded bytes of the {bytes, path} struct that `datasets` writes for an image."""
    table = pq.ParquetFile(path)
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row < rows:
            return table.read_row_group(group, [column])[column][row].as_py()["bytes"]
        row -= rows
    raise KeyError(f"no row {row}")


Prompt = tuple[Text | ImageFile, ...]
"""Text and images in reading order."""


@dataclass(frozen=True)
class Candidate:
    """A text whose likelihood is wanted behind an item's prompt.

    Attributes:
        text: the continuation.
        images: shown instead of the item's own; None: its own.
    """

    text: str
    images: tuple[ImageFile, ...] | None = None


@dataclass(frozen=True)
class Item:
    """One thing to ask of a model, or to show it answered; how it is written is the template's part.

    Attributes:
        key: names the item in the results; one of its kind in a split.
        images: "<image 2>" in `question` or `choices` says where the second one stands; unmentioned ones come first.
        question: what is asked; empty where the task is to describe the image.
        answer: what a demonstration answers, and the report shows as the truth.
        references: what metrics compare with; empty: `answer` alone.
        choices: answers to choose from; `answer` is then the letter of one.
        rationale: the reasoning to the answer, for demonstrations with chain of thought; empty: the data has none.
        candidates: texts whose likelihood is wanted.
        attributes: what else the task's metric needs to know.
        groups: figures are reported over all items and over each group.
        cluster: items of one cluster are not independent (questions about one image), so intervals resample them
            together, and none demonstrates another; None: alone.
        weight: of the item in every mean.
    """

    key: str
    images: tuple[ImageFile, ...] = ()
    question: str = ""
    answer: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    rationale: str = ""
    candidates: tuple[Candidate, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    cluster: str | None = None
    weight: float = 1.0

    @property
    def truths(self) -> tuple[str, ...]:
        """`references`, or the answer."""
        return self.references or (self.answer,)


@dataclass(frozen=True)
class Split:
    """The items of one split, in an order of which any beginning is a fair sample, and what could not be used.

    The order comes from the keys alone: whatever else is in the split, two items keep theirs.
    """

    items: tuple[Item, ...]
    rejected: tuple[Rejected, ...] = ()

    @classmethod
    def of(cls, records: Iterable[Item | Rejected], *, source: str) -> "Split":
        """The split of `records`; of items with the same key, the first is kept.

        Args:
            source: where they come from, for messages.

        Raises:
            UserError: not one item can be used.
        """
        items: dict[str, Item] = {}
        rejected = []
        for record in records:
            if isinstance(record, Rejected):
                rejected.append(record)
            elif items.setdefault(record.key, record) is not record:
                rejected.append(Rejected(record.key, Reason.DUPLICATE_KEY))
        if not items:
            first = f", the first ({rejected[0].key}): {_told(rejected[0])}" if rejected else ""
            raise UserError(
                f"{source}: none of {len(rejected)} items can be used{first}; "
                "docs/evaluation.md says what files a task reads"
            )
        return cls(tuple(sorted(items.values(), key=_place)), tuple(rejected))

    def counts(self) -> dict[str, int]:
        """How many records were left out, by reason."""
        numbers: dict[str, int] = {}
        for record in self.rejected:
            numbers[record.reason] = numbers.get(record.reason, 0) + 1
        return numbers


def _told(record: Rejected) -> str:
    return f"{record.reason}: {record.detail}" if record.detail else str(record.reason)


def _place(item: Item) -> tuple[int, str]:
    return xxhash.xxh3_64_intdigest(item.key.encode()), item.key


def in_low_resolution(item: Item) -> Item:
    """`item` with images that are shown small."""
    return replace(item, images=tuple(replace(image, high_resolution=False) for image in item.images))
