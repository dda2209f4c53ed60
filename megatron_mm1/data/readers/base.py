"""What a reader is: a data set as people keep it, as shards of documents and of records that cannot be used."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.records import Document, Reason, Rejected
from megatron_mm1.errors import UserError

MAX_RECORD = 256 << 20
"""Bytes; a damaged file can announce a record of any size, and one of these is held in memory."""


@dataclass(frozen=True)
class Shard:
    """A stretch of a data set that one process reads from beginning to end.

    Attributes:
        name: the same in every run over the same data, such as "00012.tar" or "captions.jsonl[1048576:2097152]".
        path: the file.
        size: bytes of the stretch, for progress and for sharing out work.
        start, stop: the stretch in the reader's own unit (bytes, row groups); None: to the end.
    """

    name: str
    path: Path
    size: int
    start: int = 0
    stop: int | None = None


class RejectRecord(Exception):
    """Raised inside a reader where a record turns out to be unusable.

    Attributes:
        reason, detail: see `Rejected`.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else str(reason))


class Reader(ABC):
    """Base of the built-in readers; keyword arguments of a subclass are its options (`--option NAME=VALUE`).

    Args:
        path: the data set's folder (or file).

    Attributes:
        filters: what `prepare` filters this kind of data by unless it is told otherwise; None: nothing.
    """

    filters: InterleavedFilters | None = None

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UserError(f"no data set at {path}")
        self.path = path

    @abstractmethod
    def shards(self) -> list[Shard]:
        """All of the data set in a fixed order.

        Raises:
            UserError: there is nothing this reader reads.
        """

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        """Every record of a shard in order: as a document, or with the reason why it cannot be used.

        Damage never raises: a file that cannot be read further ends with one `Rejected`.
        """

    def __iter__(self) -> Iterator[Document | Rejected]:
        for shard in self.shards():
            yield from self.read(shard)


@dataclass(frozen=True)
class Row:
    """A record as its file has it, not yet looked at.

    Attributes:
        key: see `Document`.
        value: a mapping of fields in a sound file, and anything in another.
    """

    key: str
    value: Any


def convert(rows: Iterable[Row | Rejected], document: Callable[[Any, str], Document]) -> Iterator[Document | Rejected]:
    """`document(value, key)` of every row, or why it raised `RejectRecord`."""
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            yield document(row.value, row.key)
        except RejectRecord as error:
            yield Rejected(row.key, error.reason, error.detail)


def files_below(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file `path` itself, or every file below it whose name ends in one of `suffixes`, in order of their paths.

    Raises:
        UserError: there is none, or one is a link to nothing.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(suffixes) and not file.is_dir()]
    if dangling := [file for file in files if not file.exists()]:
        raise UserError(f"{dangling[0]} is a link to nothing ({len(dangling)} of them): mend or remove it")
    if not files:
        raise UserError(f"no {', '.join(suffixes)} file in {path}")
    return files


def name_below(path: Path, file: Path) -> str:
    """What messages call `file`: its path below the data set's `path`, in valid UTF-8."""
    name = file.name if file == path or not file.is_relative_to(path) else file.relative_to(path).as_posix()
    return printable(name)


def printable(name: str) -> str:
    """A file's name in valid UTF-8: what is not is written as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
