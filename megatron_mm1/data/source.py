"""Random access to one prepared data set."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm1.data.arrays import ranges
from megatron_mm1.data.prepared import IMAGE_COLUMNS, MANIFEST, Manifest
from megatron_mm1.data.storage import Range, Storage, open_storage
from megatron_mm1.data.writer import checksum
from megatron_mm1.errors import UserError

_OFFSET, _LENGTH, _HEIGHT, _WIDTH, _POSITION, _CHECKSUM = range(len(IMAGE_COLUMNS))
_INT32 = 4


@dataclass(frozen=True)
class Piece:
    """A document, or a stretch of one, as stored: one token per image.

    Attributes:
        tokens: [n] int64.
        trained: [n] bool.
        images: encoded bytes of the images among `tokens`, in order; None where they are not those that were prepared.
        sizes: (height, width) of each image, px.
    """

    tokens: np.ndarray
    trained: np.ndarray
    images: tuple[bytes | None, ...]
    sizes: tuple[tuple[int, int], ...] = ()


class IndexedSource:
    """What `mm1 data prepare` wrote: a folder, or a URL (pickles by path, so a worker process opens its own).

    Args:
        path: the folder or URL.
        tokenizer_fingerprint: of the tokenizer that training uses; None: any will do.

    Attributes:
        manifest: what is in it.
        fingerprint: of the content: the same data prepared anywhere has the same.

    Raises:
        UserError: nothing prepared there, damaged, or prepared with another tokenizer.
    """

    def __init__(self, path: str | Path, *, tokenizer_fingerprint: str | None) -> None:
        self.path = path
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._storage = open_storage(path)
        self.manifest = _read_manifest(self._storage, path)
        if tokenizer_fingerprint not in (None, self.manifest.tokenizer):
            raise UserError(
                f"wrong tokenizer: {path} was prepared with {self.manifest.tokenizer[:12]}.., data.tokenizer is "
                f"{str(tokenizer_fingerprint)[:12]}..: prepare it again, or set the one it was made with"
            )
        parts = self.manifest.parts
        files = [{name: part.files[name] for name in sorted(part.files)} for part in parts]
        self.fingerprint = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        self._firsts = np.cumsum([0, *(part.documents for part in parts)])
        self._documents = [
            self._storage.array(f"{part.name}/documents.npy", part.files["documents.npy"]) for part in parts
        ]
        self._images = [self._storage.array(f"{part.name}/images.npy", part.files["images.npy"]) for part in parts]

    def __reduce__(self) -> tuple:
        return _open, (self.path, self._tokenizer_fingerprint)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def num_tokens(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64, stored tokens of documents: each image is one."""
        return self._differences(documents, 0)

    def num_images(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64."""
        return self._differences(documents, 1)

    def images_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [I] among their document's stored tokens and sizes [I, 2] (height, width) of all their images."""
        counts = self.num_images(documents)
        rows = np.empty((int(counts.sum()), 3), np.int64)
        begins = np.cumsum(counts) - counts
        for part, places, local in self._by_part(documents):
            bounds = self._documents[part]
            found = self._images[part][ranges(bounds[local, 1], bounds[local + 1, 1])]
            rows[ranges(begins[places], begins[places] + counts[places])] = found[:, [_POSITION, _HEIGHT, _WIDTH]]
        return rows[:, 0], rows[:, 1:]

    def trained(self, documents: np.ndarray) -> list[np.ndarray]:
        """[tokens] bool for each document: which of its stored tokens are targets of the loss."""
        requests = []
        for document in documents.tolist():
            part, local = self._place(document)
            start, stop = self._documents[part][local : local + 2, 0].tolist()
            requests.append(Range(f"{self.manifest.parts[part].name}/trained.bin", start, stop))
        return [np.frombuffer(content, np.uint8).astype(bool) for content in self._storage.read(requests)]

    def image_rows(self, part: int) -> np.ndarray:
        """[I, 6] of one part of the manifest, columns IMAGE_COLUMNS."""
        return self._images[part]

    def key(self, document: int) -> str:
        """Where a document came from."""
        return self.keys([document])[0]

    def keys(self, documents: Sequence[int]) -> list[str]:
        """The same of several documents, in one batch of reads."""
        requests = []
        for document in documents:
            part, local = self._place(document)
            start, stop = self._documents[part][local : local + 2, 2].tolist()
            requests.append(Range(f"{self.manifest.parts[part].name}/keys.bin", start, stop))
        return [content.decode(errors="replace") for content in self._storage.read(requests)]

    def piece(self, document: int, start: int = 0, stop: int | None = None) -> Piece:
        """Stored tokens `start` to `stop` of a document, with the images among them."""
        stop = int(self.num_tokens(np.array([document]))[0]) if stop is None else stop
        return self.pieces([(document, start, stop)])[0]

    def pieces(self, wanted: Sequence[tuple[int, int, int]]) -> list[Piece]:
        """(document, start, stop) each as `piece` has it, in one batch of reads."""
        requests: list[Range] = []
        rows = []
        for document, start, stop in wanted:
            part, local = self._place(document)
            name = self.manifest.parts[part].name
            token, image = self._documents[part][local, :2].tolist()
            images = self._images[part][image : int(self._documents[part][local + 1, 1])]
            images = images[(images[:, _POSITION] >= start) & (images[:, _POSITION] < stop)]
            first, last = token + start, token + stop
            requests.append(Range(f"{name}/tokens.bin", _INT32 * first, _INT32 * last))
            requests.append(Range(f"{name}/trained.bin", first, last))
            offsets, ends = images[:, _OFFSET].tolist(), (images[:, _OFFSET] + images[:, _LENGTH]).tolist()
            requests += [Range(f"{name}/images.bin", *span) for span in zip(offsets, ends, strict=True)]
            rows.append(images)
        content = iter(self._storage.read(requests))
        return [_piece(next(content), next(content), [next(content) for _ in images], images) for images in rows]

    def _differences(self, documents: np.ndarray, column: int) -> np.ndarray:
        found = np.empty(len(documents), np.int64)
        for part, places, local in self._by_part(documents):
            bounds = self._documents[part]
            found[places] = bounds[local + 1, column] - bounds[local, column]
        return found

    def _by_part(self, documents: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(part, where its documents stand among `documents`, their numbers in the part) for each part among them."""
        part_of = np.searchsorted(self._firsts, documents, side="right") - 1
        places = np.argsort(part_of, kind="stable")
        parts, begins = np.unique(part_of[places], return_index=True)
        groups = np.split(places, begins[1:]) if len(places) else []
        return [
            (int(part), group, documents[group] - self._firsts[part]) for part, group in zip(parts, groups, strict=True)
        ]

    def _place(self, document: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return part, int(document - self._firsts[part])


def _piece(tokens: bytes, trained: bytes, images: list[bytes], rows: np.ndarray) -> Piece:
    return Piece(
        tokens=np.frombuffer(tokens, np.int32).astype(np.int64),
        trained=np.frombuffer(trained, np.uint8).astype(bool),
        images=tuple(
            data if checksum(data) == expected else None
            for data, expected in zip(images, rows[:, _CHECKSUM].tolist(), strict=True)
        ),
        sizes=tuple(map(tuple, rows[:, [_HEIGHT, _WIDTH]].tolist())),
    )


def _read_manifest(storage: Storage, path: str | Path) -> Manifest:
    text = storage.text(MANIFEST)
    if text is None:
        raise UserError(
            f"no prepared data in {str(path)!r}: make it with `mm1 data prepare --reader .. --input .. "
            f"--tokenizer .. --output {path}` (the demo corpus: `mm1 data demo`)"
        )
    manifest = Manifest.from_json(text, origin=f"{path}/{MANIFEST}")
    for part in manifest.parts:
        for name, entry in part.files.items():
            if problem := storage.problem(f"{part.name}/{name}", entry["size"]):
                raise UserError(f"{path}/{part.name}/{name} {problem}: prepare the data again")
    return manifest


def _open(path: str | Path, tokenizer_fingerprint: str | None) -> IndexedSource:
    return IndexedSource(path, tokenizer_fingerprint=tokenizer_fingerprint)
