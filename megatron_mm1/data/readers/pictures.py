"""Where a record's images are: files below a folder, bytes in the record, or URLs listed in an index."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from megatron_mm1.data.readers.base import MAX_RECORD, RejectRecord, Row, Shard, files_below, name_below
from megatron_mm1.data.readers.fields import parse_json
from megatron_mm1.data.readers.lines import line_shards, read_lines
from megatron_mm1.data.readers.parquet import parquet_shards, read_parquet
from megatron_mm1.data.records import Image, Reason, Rejected
from megatron_mm1.errors import UserError


class ImageFolder:
    """Image files below `root`; nothing outside of it is opened, whatever links lead there."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"no image folder at {root}")
        self._root = root.resolve()

    def read(self, relative: str, url: str = "") -> Image:
        """The image at the path `relative`, as its file has it.

        Raises:
            RejectRecord: the file is missing, no regular file, too large or outside the folder.
        """
        try:
            file = (self._root / relative).resolve()
            if not file.is_relative_to(self._root):
                raise RejectRecord(Reason.OUTSIDE_FOLDER, ascii(relative[:200]))
            if not file.is_file():
                raise RejectRecord(Reason.MISSING_IMAGE, ascii(relative[:200]))
            if file.stat().st_size > MAX_RECORD:
                raise RejectRecord(Reason.RECORD_TOO_LARGE, ascii(relative[:200]))
            return Image(file.read_bytes(), url)
        except (OSError, ValueError, RuntimeError):  # a NUL in the path, a loop of links
            raise RejectRecord(Reason.MISSING_IMAGE, ascii(relative[:200])) from None

    def image(self, value: Any, url: str = "", index: "ImageIndex | None" = None) -> Image:
        """The image of a field: bytes, a {bytes, path} struct as `datasets` writes it, a path, or a URL in `index`.

        Raises:
            RejectRecord: see `read`; or the value is none of these, or its URL is not listed.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return Image(value, url)
        if not isinstance(value, str) or not value:
            raise RejectRecord(Reason.WRONG_FIELDS, f"an image of type {type(value).__name__}")
        if value.startswith(("http://", "https://")):
            path = index.path(value) if index else None
            if path is None:
                raise RejectRecord(Reason.MISSING_IMAGE, f"not downloaded: {value[:200]!a}")
            return self.read(path, value)
        return self.read(value, url)


class ImageIndex:
    """Paths of downloaded images by their URL, 8 bytes and the path of memory for each.

    Args:
        path: a file or a folder of files, JSON lines or Parquet, of columns `url` and `path`; or what img2dataset
            writes with `output_format=files`: Parquet of `url`, `key` and `status`, whose images are in a folder
            of the Parquet file's name.

    Raises:
        UserError: there is no entry.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UserError(f"no image index at {path}")
        hashes, paths = [], []
        for url, image in _entries(path):
            hashes.append(_digest(url))
            paths.append(image)
        if not hashes:
            raise UserError(f"the image index {path} lists no image: it needs the columns url and path, or url and key")
        order = np.argsort(np.asarray(hashes, np.uint64), kind="stable")
        self._hashes = np.asarray(hashes, np.uint64)[order]
        self._paths = pa.array(paths, pa.large_string()).take(pa.array(order))

    def path(self, url: str) -> str | None:
        """Where the image of `url` is below the image folder; None where it is not listed."""
        digest = np.uint64(_digest(url))
        place = int(np.searchsorted(self._hashes, digest))
        if place == len(self._hashes) or self._hashes[place] != digest:
            return None
        return self._paths[place].as_py()


def _digest(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode("utf-8", "surrogatepass"))


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    """(url, path) of the images that were downloaded; rows of anything else, such as failed downloads, have neither."""
    for file in files_below(path, (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")):
        for shard, row in _index_rows(file, name_below(path, file)):
            if isinstance(row, Rejected):
                raise UserError(f"the image index {shard.path} is damaged: {row.reason} at {row.key} {row.detail}")
            value = row.value if isinstance(row.value, dict) else {}
            url, image, key = value.get("url"), value.get("path"), value.get("key")
            if image is None and isinstance(key, str) and value.get("status", "success") == "success":
                image = f"{file.stem}/{key}.jpg"
            if isinstance(url, str) and isinstance(image, str):
                yield url, image


def _index_rows(file: Path, name: str) -> Iterator[tuple[Shard, Row | Rejected]]:
    if file.suffix == ".parquet":
        for shard in parquet_shards(file, name):
            for row in read_parquet(shard, ("url", "path", "key", "status")):
                yield shard, row
        return
    for shard in line_shards(file, name):
        for row in read_lines(shard):
            try:
                yield shard, row if isinstance(row, Rejected) else Row(row.key, parse_json(row.value))
            except RejectRecord as error:
                yield shard, Rejected(row.key, error.reason, error.detail)
