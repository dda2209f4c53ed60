"""A data reader of one's own: captions in a CSV file.

`mm1 data prepare --reader csv_reader.CsvReader --input pairs.csv ..`
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from megatron_mm1.data.records import Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError


class CsvReader:
    """Rows `image,caption`; images are paths relative to the file.

    Keyword-only parameters are options: `--option delimiter=";"`.
    """

    def __init__(self, path: Path, *, delimiter: str = ",") -> None:
        if not path.is_file():
            raise UserError(f"no CSV file at {path}")
        self.path = path
        self.delimiter = delimiter

    def __iter__(self) -> Iterator[Document | Rejected]:
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter=self.delimiter):
                image = self.path.parent / row["image"]
                if image.is_file():
                    yield Document(parts=(Image(image.read_bytes()), Text(row["caption"])), key=row["image"])
                else:  # counted by reason and listed by `mm1 data prepare`
                    yield Rejected(row["image"], Reason.MISSING_IMAGE)
