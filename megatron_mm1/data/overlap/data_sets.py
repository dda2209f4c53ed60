"""Both kinds of data set that can be compared, prepared folders and raw data with its reader, as samples."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_mm1.data.readers import Shard, open_reader
from megatron_mm1.data.records import Document, Image, Rejected, Text
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError

_RAW = re.compile(r"([A-Za-z_][\w.-]*):(?!//)(.+)")
_DOCUMENTS_PER_SHARD = 4096


@dataclass(frozen=True)
class Sample:
    """One document: its encoded images, and its text with a space where an image or a control symbol stands."""

    key: str
    images: tuple[bytes, ...]
    text: str


class DataSet(Protocol):
    """Samples in shards, which several processes may read at a time: it pickles."""

    def shards(self) -> Sequence[Any]:
        """The shards, the same in every process."""

    def read(self, shard: Any) -> Iterator[Sample | None]:
        """The samples of a shard; None for a record that cannot be used."""


def open_data_set(name: str, *, tokenizer: Tokenizer | None) -> DataSet:
    """What `name` names: READER:PATH, or else a prepared folder.

    Args:
        tokenizer: the one that a folder was prepared with.

    Raises:
        UserError: there is no such data, or a folder but no tokenizer.
    """
    if raw := _RAW.fullmatch(name):
        return RawData(raw[1], Path(raw[2]))
    if tokenizer is None:
        raise UserError(f"{name} is a prepared folder: name the tokenizer it was prepared with by --tokenizer FILE")
    return PreparedData(IndexedSource(name, tokenizer_fingerprint=tokenizer.fingerprint), tokenizer)


class RawData:
    """A data set as its reader reads it; pickles by name."""

    def __init__(self, reader: str, path: Path) -> None:
        self._name = reader, path
        self._reader = open_reader(reader, path)

    def __reduce__(self) -> tuple:
        return RawData, self._name

    def shards(self) -> list[Shard]:
        return self._reader.shards()

    def read(self, shard: Shard) -> Iterator[Sample | None]:
        for record in self._reader.read(shard):
            yield None if isinstance(record, Rejected) else _sample(record)


class PreparedData:
    """A folder that `mm1 data prepare` wrote."""

    def __init__(self, source: IndexedSource, tokenizer: Tokenizer) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._special = np.fromiter(tokenizer.controls.values(), np.int64)

    def shards(self) -> list[range]:
        size = len(self._source)
        starts = range(0, size, _DOCUMENTS_PER_SHARD)
        return [range(start, min(size, start + _DOCUMENTS_PER_SHARD)) for start in starts]

    def read(self, shard: range) -> Iterator[Sample]:
        for document in shard:
            piece = self._source.piece(document)
            images = tuple(data for data in piece.images if data is not None)
            yield Sample(self._source.key(document), images, self._text(piece.tokens))

    def _text(self, tokens: np.ndarray) -> str:
        stretches = np.split(tokens, np.flatnonzero(np.isin(tokens, self._special)))
        return " ".join(self._tokenizer.decode(stretch.tolist()) for stretch in stretches)


def _sample(document: Document) -> Sample:
    images = tuple(part.data for part in document.parts if isinstance(part, Image))
    text = "".join(part.text if isinstance(part, Text) else " " for part in document.parts)
    return Sample(document.key, images, text)
