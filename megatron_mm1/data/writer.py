"""Documents -> one part of a prepared data set."""

import hashlib
import io
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megatron_mm1.data.prepared import DOCUMENT_COLUMNS, IMAGE_COLUMNS
from megatron_mm1.data.records import Control, Document, Image, Text
from megatron_mm1.data.tokenizer import Tokenizer

_REMEMBERED_IMAGES = 1 << 16
_INDEX_HEADER = b"MMIDIDX\x00\x00"
_INDEX_VERSION = 1
_INDEX_INT32 = 4


class _HashedFile:
    """A file whose size and SHA-256 are known when it has been written."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.size = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def write(self, data: bytes) -> int:
        """Append `data`; returns where it starts."""
        start = self.size
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return start

    def close(self) -> dict[str, int | str]:
        self._file.close()
        return {"size": self.size, "sha256": self._digest.hexdigest()}


class PartWriter:
    """Writes documents into `folder`, which is there and empty."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._tokens, self._trained, self._blobs, self._keys = (
            _HashedFile(folder / name) for name in ("tokens.bin", "trained.bin", "images.bin", "keys.bin")
        )
        self._documents = array("q", [0] * len(DOCUMENT_COLUMNS))
        self._images = array("q")
        self._num_tokens = self._num_trained = 0
        self._recent: OrderedDict[bytes, tuple[int, int]] = OrderedDict()

    @property
    def counts(self) -> Counter[str]:
        """Documents, images, tokens and trained_tokens so far."""
        return Counter(
            documents=len(self._documents) // len(DOCUMENT_COLUMNS) - 1,
            images=self._num_images,
            tokens=self._num_tokens,
            trained_tokens=self._num_trained,
        )

    @property
    def _num_images(self) -> int:
        return len(self._images) // len(IMAGE_COLUMNS)

    def add(self, documents: Sequence[tuple[Document, Sequence[tuple[int, int]]]]) -> None:
        """Append documents, each as BOS, its parts and EOS, or as its parts where they are complete.

        Args:
            documents: each with (height, width) of its images; many at a time take a third of the time of each alone.
        """
        parts = (part for document, _ in documents for part in document.parts)
        texts = [part.text for part in parts if isinstance(part, Text) and not part.spans]
        encoded = iter(self._tokenizer.encode_batch(texts))
        tokens, trained, keys = array("i"), bytearray(), bytearray()
        for document, sizes in documents:
            self._append(document, iter(sizes), encoded, tokens, trained)
            keys += document.key.encode(errors="backslashreplace")
            self._documents.extend((self._num_tokens + len(tokens), self._num_images, self._keys.size + len(keys)))
        self._num_tokens += len(tokens)
        self._num_trained += trained.count(1)
        self._tokens.write(tokens.tobytes())
        self._trained.write(bytes(trained))
        self._keys.write(bytes(keys))

    def _append(
        self,
        document: Document,
        sizes: Iterator[tuple[int, int]],
        encoded: Iterator[list[int]],
        tokens: "array[int]",
        trained: bytearray,
    ) -> None:
        """Append one document to the tokens of a batch."""
        start = len(tokens)
        if not document.complete:
            tokens.append(self._tokenizer.bos_id)
            trained.append(0)
        last_trained = True
        for part in document.parts:
            match part:
                case Text() if part.spans:
                    ids, offsets = self._tokenizer.encode_with_offsets(part.text)
                    tokens.extend(ids)
                    trained.extend(_overlaps(offsets, part.spans))
                case Text():
                    ids = next(encoded)
                    tokens.extend(ids)
                    trained.extend(b"\1" * len(ids) if part.trained else bytes(len(ids)))
                    last_trained = part.trained
                case Image():
                    self._add_image(part.data, *next(sizes), position=len(tokens) - start)
                    tokens.append(self._tokenizer.image_id)
                    trained.append(0)
                case Control():
                    tokens.append(self._tokenizer.control_id(part.symbol))
                    trained.append(int(part.trained))
        if not document.complete and (tokens[-1] != self._tokenizer.eos_id or len(tokens) == start + 1):
            tokens.append(self._tokenizer.eos_id)
            trained.append(int(last_trained))

    def _add_image(self, data: bytes, height: int, width: int, *, position: int) -> None:
        """One that repeats within the last 65,536 is stored once."""
        digest = xxhash.xxh3_128_digest(data)
        if digest not in self._recent:
            self._recent[digest] = (self._blobs.write(data), len(data))
            if len(self._recent) > _REMEMBERED_IMAGES:
                self._recent.popitem(last=False)
        self._images.extend((*self._recent[digest], height, width, position, checksum(data)))

    def close(self) -> dict[str, dict[str, int | str]]:
        """Write the index; returns every file's size and checksum."""
        files = {file.name: file.close() for file in (self._tokens, self._trained, self._blobs, self._keys)}
        documents = np.frombuffer(self._documents, np.int64).reshape(-1, len(DOCUMENT_COLUMNS))
        images = np.frombuffer(self._images, np.int64).reshape(-1, len(IMAGE_COLUMNS))
        return files | write_index(self._folder, documents, images)


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bytes:
    """1 for each stretch of characters that has one in common with a span."""
    return bytes(any(begin < stop and end > start for start, stop in spans) for begin, end in offsets)


def checksum(data: bytes) -> int:
    """XXH3-64 as a signed number, as images.npy holds it."""
    return struct.unpack("<q", xxhash.xxh3_64_digest(data)[::-1])[0]


def write_index(folder: Path, documents: np.ndarray, images: np.ndarray) -> dict[str, dict[str, int | str]]:
    """Write documents.npy, images.npy and tokens.idx; returns their sizes and checksums."""
    contents = {"documents.npy": _npy(documents), "images.npy": _npy(images), "tokens.idx": _megatron_index(documents)}
    return {name: write_hashed(folder / name, content) for name, content in contents.items()}


def write_hashed(path: Path, content: bytes) -> dict[str, int | str]:
    """Write a file; returns its size and checksum."""
    file = _HashedFile(path)
    file.write(content)
    return file.close()


def _npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def _megatron_index(documents: np.ndarray) -> bytes:
    """The .idx file of megatron-core's IndexedDataset: one sequence to a document."""
    starts = documents[:, 0]
    count = len(starts) - 1
    return b"".join(
        [
            _INDEX_HEADER,
            struct.pack("<QBQQ", _INDEX_VERSION, _INDEX_INT32, count, count + 1),
            np.diff(starts).astype(np.int32).tobytes(),
            (starts[:-1] * 4).astype(np.int64).tobytes(),
            np.arange(count + 1, dtype=np.int64).tobytes(),
        ]
    )
