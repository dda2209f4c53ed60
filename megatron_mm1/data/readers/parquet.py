"""Parquet files by row groups, a few rows at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mm1.data.readers.base import Row, Shard
from megatron_mm1.data.records import Reason, Rejected

STRETCH = 64 << 20
"""Bytes of a large file that one shard holds, or one row group where that is larger."""
_ROWS_AT_ONCE = 32
"""They may hold images."""
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError)


def parquet_shards(file: Path, name: str) -> list[Shard]:
    """Row groups of `file` in stretches of about 64 MiB; a damaged file is one shard, whose reading tells."""
    size = file.stat().st_size
    try:
        with pq.ParquetFile(file) as table:
            sizes = [_stored_bytes(table.metadata.row_group(group)) for group in range(table.num_row_groups)]
    except _DAMAGE:
        return [Shard(name, file, size)]
    if sum(sizes) <= STRETCH:
        return [Shard(name, file, size)]
    shards, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > STRETCH:
            shards.append(Shard(f"{name}[{start}:{stop}]", file, sum(sizes[start:stop]), start, stop))
            start = stop
    return shards


def _stored_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(column).total_compressed_size for column in range(group.num_columns))


def read_parquet(shard: Shard, columns: Sequence[str]) -> Iterator[Row | Rejected]:
    """Every row as a mapping of those of `columns` that the file has; the key is the file's name and the row's number.

    A row group that cannot be read is one `Rejected` that says how many of its rows were lost; the others are read.
    """
    name = shard.name if shard.stop is None else shard.name.rpartition("[")[0]
    try:
        table = pq.ParquetFile(shard.path, page_checksum_verification=True, buffer_size=1 << 20)
    except _DAMAGE as error:
        yield Rejected(name, Reason.TRUNCATED_FILE, str(error))
        return
    with table:
        present = [column for column in columns if column in table.schema_arrow.names]
        if not present:
            detail = f"none of the columns {', '.join(columns)}; it has {', '.join(table.schema_arrow.names)}"
            yield Rejected(name, Reason.WRONG_FIELDS, detail)
        elif table.metadata.num_rows == 0:
            yield Rejected(name, Reason.EMPTY_FILE)
        else:
            stop = table.num_row_groups if shard.stop is None else shard.stop
            for group in range(shard.start, stop):
                yield from _row_group(table, group, present, name)
            listed = sum(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))
            if stop == table.num_row_groups and listed != table.metadata.num_rows:
                detail = f"{table.metadata.num_rows} rows announced, {listed} in the row groups"
                yield Rejected(name, Reason.TRUNCATED_FILE, detail)


def _row_group(table: pq.ParquetFile, group: int, columns: list[str], name: str) -> Iterator[Row | Rejected]:
    row = sum(table.metadata.row_group(earlier).num_rows for earlier in range(group))
    end = row + table.metadata.row_group(group).num_rows
    try:
        for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
            for value in _rows(batch):
                yield Row(f"{name}#{row}", value) if isinstance(value, dict) else Rejected(f"{name}#{row}", value)
                row += 1
        if row < end:  # damage that Arrow takes for the end
            yield Rejected(f"{name}#{row}", Reason.TRUNCATED_FILE, f"rows {row} to {end - 1} are missing")
    except _DAMAGE as error:
        yield Rejected(f"{name}#{row}", Reason.TRUNCATED_FILE, f"rows {row} to {end - 1}: {error}")


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | Reason]:
    try:
        return batch.to_pylist()
    except ValueError:  # a text that is not UTF-8: one row at a time
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(batch: pa.RecordBatch) -> dict[str, Any] | Reason:
    try:
        return batch.to_pylist()[0]
    except ValueError:
        return Reason.NOT_UTF8
