"""Files that are written once, from beginning to end, while other threads see to checksum and disk."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SYNC_BYTES = 1 << 26  # worth a trip to the disk
_INLINE_BYTES = 1 << 16  # not worth another thread


class StreamedFile:
    """A file that goes to disk while the rest of it is still being written; all of it is there when it is closed.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path, *, checksum: bool = False) -> None:
        self.path = path
        self.size = 0
        self._synced = 0
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256() if checksum else None
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None

    def __enter__(self) -> "StreamedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, data: Any) -> int:
        """Append bytes, or anything that has a buffer of them."""
        content = memoryview(data).cast("B")
        size = content.nbytes
        if self._digest is None:
            self._append(content)
        elif size < _INLINE_BYTES:
            self._digest.update(content)
            self._append(content)
        else:
            hashed = self._hasher.submit(self._digest.update, content)
            try:
                self._append(content)
            finally:
                hashed.result()
        self._send_to_disk()
        return size

    def flush(self) -> None:
        """Nothing: what libraries want at the end of what they write is done at the end of the file."""

    def close(self) -> None:
        with self._file:
            self._hasher.shutdown()
            self._syncer.shutdown()
            if self._sync is not None:
                self._sync.result()
            os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """The checksum of what was written so far, of a file that was opened to have one."""
        assert self._digest is not None
        return self._digest.hexdigest()

    def _append(self, content: memoryview) -> None:
        self.size += content.nbytes
        while content:
            content = content[self._file.write(content) :]

    def _send_to_disk(self) -> None:
        """Start with what is there, unless the disk is still busy with what was there before."""
        if self.size - self._synced < _SYNC_BYTES or (self._sync is not None and not self._sync.done()):
            return
        if self._sync is not None:
            self._sync.result()
        self._sync = self._syncer.submit(os.fsync, self._file.fileno())
        self._synced = self.size
