"""Readers of rows: JSON lines (also .gz and .zst) and Parquet, whose layouts differ in their fields only."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm1.data.readers.base import (
    Reader,
    RejectRecord,
    Row,
    Shard,
    convert,
    files_below,
    name_below,
)
from megatron_mm1.data.readers.fields import parse_json
from megatron_mm1.data.readers.lines import line_shards, read_lines
from megatron_mm1.data.readers.parquet import parquet_shards, read_parquet
from megatron_mm1.data.records import Document, Rejected

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)


class RowReader(Reader):
    """One document per row of the files in a folder.

    Attributes:
        suffixes: of the files it reads.
        columns: of Parquet files, those that it needs.
    """

    suffixes: tuple[str, ...] = (*JSON_LINES, *PARQUET)
    columns: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """The files in a fixed order.

        Raises:
            UserError: there is none.
        """
        return files_below(self.path, self.suffixes)

    def shards(self) -> list[Shard]:
        shards = []
        for file in self.files():
            split = parquet_shards if file.suffix in PARQUET else line_shards
            shards += split(file, name_below(self.path, file))
        return shards

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        return convert(self.rows(shard), self.document)

    def rows(self, shard: Shard) -> Iterator[Row | Rejected]:
        """Every row of a shard in order."""
        if shard.path.suffix in PARQUET:
            yield from read_parquet(shard, self.columns)
            return
        for row in read_lines(shard):
            try:
                yield row if isinstance(row, Rejected) else Row(row.key, self.parse(row.value, shard))
            except RejectRecord as error:
                yield Rejected(row.key, error.reason, error.detail)

    def parse(self, line: bytes, shard: Shard) -> Any:
        """The value of a line.

        Raises:
            RejectRecord: it has none.
        """
        return parse_json(line)

    @abstractmethod
    def document(self, row: Any, key: str) -> Document:
        """The document of one row.

        Raises:
            RejectRecord: the row cannot be used.
        """
