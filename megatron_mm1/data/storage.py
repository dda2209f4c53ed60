"""Where prepared data lies: a local folder, or a URL of object storage through fsspec."""

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mm1.data.files import replace_file
from megatron_mm1.errors import UserError

CACHE_VARIABLE = "MM1_CACHE_DIR"
"""Environment variable: the folder for local copies of remote indices; ~/.cache/megatron_mm1 without it."""
_ATTEMPTS = 4
_FIRST_WAIT = 0.5
_OPEN_FILES = 4096


class Range(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    name: str
    start: int
    stop: int


class Storage(ABC):
    """Files of one prepared data set, by names relative to it."""

    @abstractmethod
    def text(self, name: str) -> str | None:
        """A small file; None where there is none."""

    @abstractmethod
    def problem(self, name: str, size: int) -> str | None:
        """What is wrong with a file that should have `size` bytes."""

    @abstractmethod
    def array(self, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        """A .npy file, mapped into memory; `entry` has the size and SHA-256 it should have."""

    @abstractmethod
    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range."""


class LocalFolder(Storage):
    """A folder, read through memory maps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map = lru_cache(maxsize=_OPEN_FILES)(self._open)

    def text(self, name: str) -> str | None:
        file = self._path / name
        return file.read_text(errors="replace") if file.is_file() else None

    def problem(self, name: str, size: int) -> str | None:
        file = self._path / name
        found = file.stat().st_size if file.is_file() else 0
        return None if found == size else f"has {found} bytes instead of {size}"

    def array(self, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        try:
            return np.load(self._path / name, mmap_mode="r")
        except ValueError:
            raise UserError(f"{self._path / name} is damaged: prepare the data again") from None

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        return [self._map(name)[start:stop].tobytes() if stop > start else b"" for name, start, stop in ranges]

    def _open(self, name: str) -> np.ndarray:
        return np.memmap(self._path / name, np.uint8, mode="r")


class RemoteFolder(Storage):
    """A URL that fsspec opens: indices are copied to a local folder, everything else is read by byte ranges.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {url}: {error} (S3 needs the package s3fs)") from None
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "megatron_mm1") / "sources" / name

    def text(self, name: str) -> str | None:
        content = self._whole(name)
        return None if content is None else content.decode(errors="replace")

    def problem(self, name: str, size: int) -> str | None:
        return None  # asking for every file takes minutes; what is read is checked

    def array(self, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        copy = self._cache / entry["sha256"]
        if not copy.is_file() or copy.stat().st_size != entry["size"]:
            content = self._whole(name)
            if content is None:
                raise UserError(f"{self.url} has no {name}: copy all of the prepared folder there")
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise UserError(f"{self.url}/{name} is not what its manifest says: prepare the data again")
            replace_file(copy, content)
        return np.load(copy, mmap_mode="r")

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        wanted = [place for place, (_, start, stop) in enumerate(ranges) if stop > start]
        names, starts, stops = zip(*(ranges[place] for place in wanted), strict=True) if wanted else ((), (), ())
        paths = [self._at(name) for name in names]

        def fetch() -> list[bytes]:
            return self._files.cat_ranges(paths, list(starts), list(stops), on_error="raise")

        found = self._persist(fetch, "byte ranges") if wanted else []
        content = [b""] * len(ranges)
        for place, part, start, stop in zip(wanted, found, starts, stops, strict=True):
            if len(part) != stop - start:
                raise UserError(f"{self.url}/{ranges[place].name} is shorter than its manifest says: copy it again")
            content[place] = bytes(part)
        return content

    def _whole(self, name: str) -> bytes | None:
        """A file; None where there is none."""

        def fetch() -> bytes | None:
            try:
                return self._files.cat_file(self._at(name))
            except FileNotFoundError:
                return None

        return self._persist(fetch, name)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _persist(self, fetch: Any, what: str) -> Any:
        """`fetch()`, tried again where the network failed."""
        for attempt in range(_ATTEMPTS):
            try:
                return fetch()
            except Exception as error:  # every backend has exceptions of its own
                if attempt + 1 == _ATTEMPTS:
                    raise UserError(
                        f"cannot read {what} of {self.url} in {_ATTEMPTS} attempts: {type(error).__name__}: {error}"
                    ) from None
                time.sleep(_FIRST_WAIT * 2**attempt)


def open_storage(path: str | Path) -> Storage:
    """The storage of a path or URL."""
    return RemoteFolder(str(path)) if is_url(path) else LocalFolder(Path(path))


def is_url(path: str | Path) -> bool:
    return "://" in str(path)
