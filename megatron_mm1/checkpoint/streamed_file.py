"""Files that are written once, from beginning to end, while other threads see to checksum and disk."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SYNC_BYTES = 1 << 26  # worth a trip to the disk
_WRITE_BYTES = 1 << 18  # at a time; for larger writes Linux wants larger pages, which it may be slow to find
_LARGE = 1 << 16  # less is collected first


class StreamedFile:
    """A file that goes to disk while the rest of it is still being written; all of it is there when it is closed.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path, *, checksum: bool = False) -> None:
        self.path = path
        self.size = 0
        self._synced = 0
        self._small = bytearray()
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256() if checksum else None
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hashed: Future[None] | None = None
        self._sync: Future[None] | None = None

    def __enter__(self) -> "StreamedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, data: Any, *, lasting: bool = False) -> int:
        """Append bytes, or anything that has a buffer of them.

        Args:
            lasting: the buffer will not change, so that the checksum may fall behind; by no more than one of them.
        """
        content = memoryview(data).cast("B")
        self.size += content.nbytes
        if content.nbytes < _LARGE:
            self._small += content
            if len(self._small) >= _LARGE:
                self._put_small()
        else:
            self._put_small()
            self._put(content if lasting or self._digest is None else bytes(content))
        return content.nbytes

    def flush(self) -> None:
        """Nothing: what libraries want at the end of what they write is done at the end of the file."""

    def close(self) -> None:
        with self._file:
            self._put_small()
            self._hasher.shutdown()
            self._syncer.shutdown()
            if self._sync is not None:
                self._sync.result()
            os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """The checksum of a closed file that was opened to have one."""
        assert self._digest is not None
        return self._digest.hexdigest()

    def _put_small(self) -> None:
        if self._small:
            content, self._small = bytes(self._small), bytearray()
            self._put(content)

    def _put(self, content: memoryview | bytes) -> None:
        if self._digest is not None:
            if self._hashed is not None:
                self._hashed.result()
            self._hashed = self._hasher.submit(self._digest.update, content)
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest[:_WRITE_BYTES]) :]
        self._send_to_disk()

    def _send_to_disk(self) -> None:
        """Start with what is there, unless the disk is still busy with what was there before."""
        if self.size - self._synced < _SYNC_BYTES or (self._sync is not None and not self._sync.done()):
            return
        if self._sync is not None:
            self._sync.result()
        self._sync = self._syncer.submit(os.fsync, self._file.fileno())
        self._synced = self.size
