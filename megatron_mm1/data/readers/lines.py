"""Files of lines: plain ones in stretches of bytes, compressed ones (.gz, .zst) from beginning to end."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_mm1.data.readers.base import MAX_RECORD, Row, Shard
from megatron_mm1.data.records import Reason, Rejected

STRETCH = 64 << 20
"""Bytes of a large file that one shard holds."""
_SKIPPED_AT_ONCE = 1 << 20


def line_shards(file: Path, name: str, *, stretch: int = STRETCH) -> list[Shard]:
    """`file` in stretches of about `stretch` bytes that begin and end where a line does."""
    size = file.stat().st_size
    if size <= stretch or file.suffix in (".gz", ".zst"):
        return [Shard(name, file, size)]
    starts = [0]
    with file.open("rb") as lines:
        for target in range(stretch, size, stretch):
            if target <= starts[-1]:
                continue  # inside a line longer than a stretch
            lines.seek(target - 1)  # a line that ends here leaves the next one to begin at `target`
            _skip_line(lines)
            if lines.tell() < size:
                starts.append(lines.tell())
    stops = [*starts[1:], size]
    return [
        Shard(f"{name}[{start}:{stop}]", file, stop - start, start, stop)
        for start, stop in zip(starts, stops, strict=True)
    ]


def read_lines(shard: Shard) -> Iterator[Row | Rejected]:
    """Every line that is not blank, as bytes without its end.

    The key is the file's name and, of a plain file, the byte where the line begins ("a.jsonl@512"); of a compressed one
    the line's number ("a.jsonl.zst:7").
    """
    name = shard.name if shard.stop is None else shard.name.rpartition("[")[0]
    found = False
    for row in _compressed_lines(shard, name) if shard.path.suffix in (".gz", ".zst") else _plain_lines(shard, name):
        found = True
        yield row
    if not found:
        yield Rejected(name, Reason.EMPTY_FILE)


def _plain_lines(shard: Shard, name: str) -> Iterator[Row | Rejected]:
    position = shard.start
    try:
        with shard.path.open("rb") as lines:
            lines.seek(position)
            while shard.stop is None or position < shard.stop:
                line = lines.readline(MAX_RECORD)
                if not line:
                    break
                yield from _checked(line, lines, f"{name}@{position}")
                position = lines.tell()
    except OSError as error:
        yield Rejected(f"{name}@{position}", Reason.TRUNCATED_FILE, str(error))


def _compressed_lines(shard: Shard, name: str) -> Iterator[Row | Rejected]:
    number = 1
    try:
        with shard.path.open("rb") as file, _decompressed(file, shard.path.suffix) as lines:
            while line := lines.readline(MAX_RECORD):
                yield from _checked(line, lines, f"{name}:{number}")
                number += 1
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        yield Rejected(f"{name}:{number}", Reason.TRUNCATED_FILE, str(error))


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdFile(file))


class _ZstdFile(io.RawIOBase):
    """The content of zstd frames; EOFError where the last is not complete, which zstandard's own reader hides."""

    _CHUNK = 4 << 10  # bytes; a block of 4 bytes may hold 128 KiB, so a chunk of a hostile file becomes 128 MiB at most

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and (self._rest or self._more()):
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(self._rest))
            self._rest = b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _more(self) -> bool:
        self._rest = self._file.read(self._CHUNK)
        if not self._rest and self._frame is not None:
            raise EOFError("the last zstd frame is not complete")
        return bool(self._rest)


def _checked(line: bytes, lines: BinaryIO, key: str) -> Iterator[Row | Rejected]:
    if len(line) == MAX_RECORD and not line.endswith(b"\n"):
        _skip_line(lines)
        yield Rejected(key, Reason.RECORD_TOO_LARGE)
    elif line.strip():
        yield Row(key, line.rstrip(b"\r\n"))


def _skip_line(lines: BinaryIO) -> None:
    while (piece := lines.readline(_SKIPPED_AT_ONCE)) and not piece.endswith(b"\n"):
        pass
