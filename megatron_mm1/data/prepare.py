"""Documents -> an indexed folder of tokens and image bytes, which training reads at random through a memory map.

manifest.json    format, counts, tokenizer fingerprint, sizes and SHA-256 of the other files
tokens.bin       int32 [T], all documents one after another; each image is one image id
trained.bin      uint8 [T], 1 where the token is a target of the loss
documents.npy    int64 [D + 1, 2], where each document's tokens and images start
images.npy       int64 [I, 5], columns IMAGE_COLUMNS
images.bin       the encoded images
"""

import hashlib
import io
import json
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mm1.data.files import new_folder
from megatron_mm1.data.images import UnusableImage, check_image
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.records import Document, Image
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IMAGE_COLUMNS = ("offset", "length", "height", "width", "position")
"""Byte range in images.bin, px as the file's header has them, and place among its document's tokens."""
_REMEMBERED_IMAGES = 1 << 16


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


class _Writer:
    """Writes one document after another into `folder`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.tokens = _HashedFile(folder / "tokens.bin")
        self.trained = _HashedFile(folder / "trained.bin")
        self.blobs = _HashedFile(folder / "images.bin")
        self.documents = [(0, 0)]
        self.images: list[tuple[int, int, int, int, int]] = []
        self.counts: Counter[str] = Counter(documents=0, images=0, tokens=0, trained_tokens=0)
        self._recent: OrderedDict[bytes, tuple[int, int, int, int]] = OrderedDict()

    def add(self, document: Document) -> None:
        """Append BOS, the parts and EOS.

        Raises:
            UnusableImage: an image cannot be used; the document is left out.
        """
        tokens, trained = [self.tokenizer.bos_id], [0]
        images = []
        last_trained = True
        for part in document.parts:
            if isinstance(part, Image):
                images.append((*self._store(part.data), len(tokens)))
                tokens.append(self.tokenizer.image_id)
                trained.append(0)
            else:
                ids = self.tokenizer.encode(part.text)
                tokens += ids
                trained += [int(part.trained)] * len(ids)
                last_trained = part.trained
        tokens.append(self.tokenizer.eos_id)
        trained.append(int(last_trained))

        self.tokens.write(np.asarray(tokens, np.int32).tobytes())
        self.trained.write(bytes(trained))
        self.images += images
        self.counts.update(documents=1, images=len(images), tokens=len(tokens), trained_tokens=sum(trained))
        self.documents.append((self.counts["tokens"], self.counts["images"]))

    def _store(self, data: bytes) -> tuple[int, int, int, int]:
        """Where `data` is, and its size in px; an image that repeats within the last 65,536 is stored once."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._recent:
            height, width = check_image(data)
            self._recent[digest] = (self.blobs.write(data), len(data), height, width)
            if len(self._recent) > _REMEMBERED_IMAGES:
                self._recent.popitem(last=False)
        return self._recent[digest]

    def close(self) -> dict[str, dict[str, int | str]]:
        """Write the index; returns every file's size and checksum."""
        files = [self.tokens, self.trained, self.blobs]
        images = np.asarray(self.images, np.int64).reshape(-1, len(IMAGE_COLUMNS))
        for name, array in (("documents.npy", np.asarray(self.documents, np.int64)), ("images.npy", images)):
            content = io.BytesIO()
            np.save(content, array)
            files.append(_HashedFile(self.folder / name))
            files[-1].write(content.getvalue())
        return {file.name: file.close() for file in files}


def prepare(
    documents: Iterable[Document], *, tokenizer: Tokenizer, output: Path, origin: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Write `documents` to the new folder `output`.

    Args:
        documents: what a reader yields; its `skipped` counts are taken over.
        origin: what the documents were made from; an `output` of the same origin and tokenizer is kept as it is.

    Returns:
        Counts: documents, images, tokens, trained_tokens, and "skipped: <reason>" for each reason.

    Raises:
        UserError: `output` exists and was made from something else, or there is no document that can be used.
    """
    origin = dict(origin or {})
    if output.exists():
        return _existing_counts(output, tokenizer=tokenizer, origin=origin)
    with new_folder(output) as folder:
        writer = _Writer(folder, tokenizer)
        skipped: Counter[str] = Counter()
        for document in documents:
            try:
                writer.add(document)
            except UnusableImage as reason:
                skipped[reason.kind] += 1
        files = writer.close()
        skipped.update(getattr(documents, "skipped", {}))
        counts = dict(writer.counts) | {f"skipped: {reason}": count for reason, count in sorted(skipped.items())}
        if not counts["documents"]:
            raise UserError(f"no usable document for {output}: {json.dumps(counts)}")
        manifest = {
            "format": FORMAT_VERSION,
            "counts": counts,
            "tokenizer": tokenizer.fingerprint,
            "origin": origin,
            "files": files,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return counts


def _existing_counts(output: Path, *, tokenizer: Tokenizer, origin: dict[str, str]) -> dict[str, int]:
    try:
        manifest = json.loads((output / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(f"{output} exists and is no prepared data set: choose another output") from None
    if (manifest.get("format"), manifest.get("tokenizer"), manifest.get("origin")) != (
        FORMAT_VERSION,
        tokenizer.fingerprint,
        origin,
    ):
        raise UserError(
            f"{output} holds data prepared from another input, reader or tokenizer: remove it or choose another output"
        )
    return manifest["counts"]


def input_fingerprint(path: Path) -> str:
    """SHA-256 over name, size and modification time of every file below `path`."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            digest.update(
                f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="replace")
            )
    return digest.hexdigest()


def prepare_main(args: Namespace) -> dict[str, int]:
    """Prepare a data set: `args` has reader (name or class path), input, tokenizer and output (paths)."""
    source = Path(args.input)
    reader = open_reader(args.reader, source)
    origin = {"reader": args.reader, "input": input_fingerprint(source)}
    return prepare(reader, tokenizer=Tokenizer(args.tokenizer), output=Path(args.output), origin=origin)
