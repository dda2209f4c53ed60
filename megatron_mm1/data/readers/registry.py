"""Readers by name, or by the import path of a class in the user's own package."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_mm1.data.readers.base import Reader, Shard
from megatron_mm1.data.readers.captions import ParquetCaptions, WebDataset
from megatron_mm1.data.readers.chat import Chat
from megatron_mm1.data.readers.energon import Energon
from megatron_mm1.data.readers.interleaved import Mmc4, Obelics
from megatron_mm1.data.readers.jsonlines import Captions, Interleaved, PlainText, Questions
from megatron_mm1.data.readers.llava import Llava
from megatron_mm1.data.readers.options import parse_options
from megatron_mm1.data.records import Document, Rejected
from megatron_mm1.errors import UserError
from megatron_mm1.extension import resolve

READERS: dict[str, type[Reader]] = {
    "captions": Captions,
    "webdataset": WebDataset,
    "parquet-captions": ParquetCaptions,
    "interleaved": Interleaved,
    "obelics": Obelics,
    "mmc4": Mmc4,
    "text": PlainText,
    "questions": Questions,
    "llava": Llava,
    "chat": Chat,
    "energon": Energon,
}


class IterableReader(Reader):
    """A class of the user's own that iterates over documents and rejected records, as one shard.

    Args:
        documents: an instance of it.
        name: what the user calls it.
    """

    def __init__(self, path: Path, documents: object, *, name: str) -> None:
        super().__init__(path)
        if not hasattr(documents, "__iter__"):
            raise UserError(f"reader {name!r} cannot be iterated over: give it __iter__, or derive it from Reader")
        self._documents = documents
        self._name = name

    def shards(self) -> list[Shard]:
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return [Shard(self.path.name, self.path, sum(file.stat().st_size for file in files if file.is_file()))]

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        for document in self._documents:
            if not isinstance(document, Document | Rejected):
                kind = type(document).__name__
                raise UserError(f"reader {self._name!r} yields a {kind}: it must yield Document and Rejected")
            yield document


def open_reader(
    name: str, path: Path, options: Mapping[str, str] | None = None, *, tokenizer: Path | None = None
) -> Reader:
    """The reader called `name` over `path`.

    Args:
        name: of `READERS`, or the import path of a class: a `Reader`, or any class that takes a path and iterates over
            `Document` and `Rejected`.
        options: keyword-only parameters of the class, as texts.
        tokenizer: for a class that has an option of that name, where `options` has none.

    Raises:
        UserError: there is no such reader, option or data set.
    """
    reader_class = resolve("data reader", name, READERS)
    if not isinstance(reader_class, type):
        raise UserError(f"data reader {name!r} is no class")
    options = dict(options or {})
    if tokenizer is not None and "tokenizer" in inspect.signature(reader_class).parameters:
        options.setdefault("tokenizer", str(tokenizer))
    reader = reader_class(path, **parse_options(reader_class, name, options))
    return reader if isinstance(reader, Reader) else IterableReader(path, reader, name=name)
