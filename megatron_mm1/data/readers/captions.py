"""Pairs of an image and a caption, or one of several captions: WebDataset tar files and Parquet tables."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from megatron_mm1.data.readers.base import Reader, RejectRecord, Row, Shard, convert, files_below, name_below
from megatron_mm1.data.readers.fields import clean_text, decode_text, mapping, parse_json
from megatron_mm1.data.readers.pictures import ImageFolder
from megatron_mm1.data.readers.rows import PARQUET, RowReader
from megatron_mm1.data.readers.tars import IMAGE_EXTENSIONS, Sample, read_samples
from megatron_mm1.data.records import Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError


@dataclass(frozen=True)
class CaptionChoice:
    """Which of a record's captions is used: drawn by weight from (seed, key), so that it is the same in every run.

    Attributes:
        weights: of each caption by its name.
    """

    weights: Mapping[str, float]
    seed: int

    @classmethod
    def parse(cls, text: str, *, seed: int) -> "CaptionChoice":
        """From "txt=0.3,json:vecap=0.7"; a name without a weight has 1.

        Raises:
            UserError: a weight is no positive number, or a name comes twice.
        """
        weights: dict[str, float] = {}
        for item in text.split(","):
            name, _, weight = item.strip().partition("=")
            try:
                value = float(weight or 1)
            except ValueError:
                value = math.nan
            if not name or name in weights or not 0 < value < math.inf:
                raise UserError(f"captions {text!r}: expected NAME=WEIGHT,.. with different names and positive weights")
            weights[name] = value
        return cls(weights, seed)

    def choose(self, key: str, captions: Mapping[str, Any]) -> str:
        """Clean text of one of `captions`; those that a record lacks (None) leave their share to the others.

        Raises:
            RejectRecord: there is none, or the drawn one cannot be used.
        """
        present = {name: weight for name, weight in self.weights.items() if captions.get(name) is not None}
        if not present:
            raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"no caption {' or '.join(self.weights)}")
        drawn = xxhash.xxh3_64_intdigest(f"{self.seed}\0{key}".encode()) / 2**64 * sum(present.values())
        ends = list(accumulate(present.values()))
        name = list(present)[min(bisect_right(ends, drawn), len(ends) - 1)]
        caption = captions[name]
        if isinstance(caption, bytes):
            return decode_text(caption)
        if not isinstance(caption, str):
            raise RejectRecord(Reason.WRONG_FIELDS, f"caption {name} is a {type(caption).__name__}")
        return clean_text(caption)


class WebDataset(Reader):
    """Tar files of img2dataset and WebDataset: an image (.jpg, .png, ..) and a caption (.txt or a field of .json).

    Args:
        captions: "txt=0.3,json:vecap=0.7": extensions, or extension:field for a JSON member, with their weights.
            Left out: .txt, and the field `caption` of .json in samples without one.
        seed: of the draw.
    """

    def __init__(self, path: Path, *, captions: str | None = None, seed: int = 0) -> None:
        super().__init__(path)
        self._choice = CaptionChoice.parse(captions, seed=seed) if captions else None
        names = self._choice.weights if self._choice else ("txt", "json")
        self._wanted = IMAGE_EXTENSIONS | {name.partition(":")[0] for name in names}

    def shards(self) -> list[Shard]:
        files = files_below(self.path, (".tar",))
        return [Shard(name_below(self.path, file), file, file.stat().st_size) for file in files]

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        samples = read_samples(shard, self._wanted.__contains__)
        rows = (sample if isinstance(sample, Rejected) else Row(sample.key, sample) for sample in samples)
        return convert(rows, self._document)

    def _document(self, sample: Sample, key: str) -> Document:
        image = next((part for extension, part in sample.parts.items() if extension in IMAGE_EXTENSIONS), None)
        if not image:
            raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"no image; members {', '.join(sample.parts)}")
        choice = self._choice or CaptionChoice({"txt" if "txt" in sample.parts else "json:caption": 1.0}, 0)
        caption = choice.choose(key, {name: _member_field(sample, name) for name in choice.weights})
        return Document((Image(image), Text(caption)), key)


def _member_field(sample: Sample, name: str) -> Any:
    """The member `txt`, or the field of the JSON member `json:field`; None where there is none."""
    extension, _, field = name.partition(":")
    content = sample.parts.get(extension)
    return mapping(parse_json(content)).get(field) if field and content is not None else content


class ParquetCaptions(RowReader):
    """Tables of captions and images: paths below a folder, bytes, or the structs that `datasets` writes.

    Args:
        image, url: columns; a table without the latter has none.
        captions: columns with their weights, "caption=0.3,vecap=0.7".
        images: the folder of image files; left out: the data set's folder.
        seed: of the draw.
    """

    suffixes = PARQUET

    def __init__(
        self,
        path: Path,
        *,
        image: str = "image",
        captions: str = "caption",
        url: str = "url",
        images: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(path)
        self._image, self._url = image, url
        self._choice = CaptionChoice.parse(captions, seed=seed)
        self._folder = ImageFolder(images or (path if path.is_dir() else path.parent))
        self.columns = (image, url, *self._choice.weights)

    def document(self, row: Any, key: str) -> Document:
        caption = self._choice.choose(key, row)
        if row.get(self._image) is None:
            raise RejectRecord(Reason.INCOMPLETE_SAMPLE, f"no image in column {self._image!r}")
        url = row.get(self._url)
        return Document((self._folder.image(row[self._image], url if isinstance(url, str) else ""), Text(caption)), key)
