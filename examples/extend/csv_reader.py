"""A data reader of one's own: captions in a CSV file.

`mm1 data prepare --reader csv_reader.CsvReader --input pairs.csv ..`
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_mm1.data.records import Document, Image, Text
from megatron_mm1.errors import UserError


class CsvReader:
    """Rows `image,caption`; images are paths relative to the file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"no CSV file at {path}")
        self.path = path
        self.skipped: Counter[str] = Counter()
        """Rows that could not be used, by reason: reported by `mm1 data prepare`."""

    def __iter__(self) -> Iterator[Document]:
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                image = self.path.parent / row["image"]
                if not image.is_file():
                    self.skipped["missing image"] += 1
                    continue
                yield Document(parts=(Image(image.read_bytes()), Text(row["caption"])), key=row["image"])
