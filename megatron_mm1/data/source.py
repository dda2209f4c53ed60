"""Random access to one prepared data set."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm1.data.prepare import FORMAT_VERSION, IMAGE_COLUMNS, MANIFEST
from megatron_mm1.errors import UserError

_OFFSET, _LENGTH, _HEIGHT, _WIDTH, _POSITION = range(len(IMAGE_COLUMNS))


@dataclass(frozen=True)
class Piece:
    """A document, or a stretch of one, as stored: one token per image.

    Attributes:
        tokens: [n] int64.
        trained: [n] bool.
        images: encoded bytes of the images among `tokens`, in order.
    """

    tokens: np.ndarray
    trained: np.ndarray
    images: tuple[bytes, ...]


class IndexedSource:
    """The folder `mm1 data prepare` wrote, through memory maps (pickles by path, so a worker process opens its own).

    Args:
        path: the folder.
        tokenizer_fingerprint: of the tokenizer that training uses.

    Raises:
        UserError: nothing prepared there, damaged, or prepared with another tokenizer.
    """

    def __init__(self, path: str | Path, *, tokenizer_fingerprint: str) -> None:
        self.path = Path(path)
        manifest = self._read_manifest()
        if manifest["tokenizer"] != tokenizer_fingerprint:
            raise UserError(
                f"wrong tokenizer: {self.path} was prepared with {manifest['tokenizer'][:12]}.., "
                f"data.tokenizer is {tokenizer_fingerprint[:12]}..: prepare it again, or set the one it was made with"
            )
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self.fingerprint = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
        """Of the content: the same data prepared anywhere has the same."""
        self._tokens = self._map("tokens.bin", np.int32)
        self._trained = self._map("trained.bin", np.uint8)
        self._blobs = self._map("images.bin", np.uint8)
        self._documents = np.load(self.path / "documents.npy", mmap_mode="r")
        self._images = np.load(self.path / "images.npy", mmap_mode="r")

    def __reduce__(self) -> tuple:
        return _open, (self.path, self._tokenizer_fingerprint)

    def __len__(self) -> int:
        return len(self._documents) - 1

    @property
    def num_tokens(self) -> np.ndarray:
        """[D] int64, stored tokens of each document: each image is one."""
        return np.diff(self._documents[:, 0])

    @property
    def num_images(self) -> np.ndarray:
        """[D] int64."""
        return np.diff(self._documents[:, 1])

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """[D] int64, positions of each document once its images take `tokens_per_image` positions each."""
        return self.num_tokens + self.num_images * (tokens_per_image - 1)

    def image_positions(self, document: int) -> np.ndarray:
        """[n] int64, where the document's images stand among its stored tokens."""
        return self._images[self._documents[document, 1] : self._documents[document + 1, 1], _POSITION]

    def piece(self, document: int, start: int = 0, stop: int | None = None) -> Piece:
        """Stored tokens `start` to `stop` of a document, with the images among them."""
        first, last = self._documents[document, 0], self._documents[document + 1, 0]
        stop = int(last - first) if stop is None else stop
        positions = self.image_positions(document)
        inside = self._documents[document, 1] + np.flatnonzero((positions >= start) & (positions < stop))
        return Piece(
            tokens=self._tokens[first + start : first + stop].astype(np.int64),
            trained=self._trained[first + start : first + stop].astype(bool),
            images=tuple(self._blob(int(image)) for image in inside),
        )

    def _blob(self, image: int) -> bytes:
        offset, length = self._images[image, _OFFSET], self._images[image, _LENGTH]
        return self._blobs[offset : offset + length].tobytes()

    def _map(self, name: str, dtype: type) -> np.ndarray:
        path = self.path / name
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def _read_manifest(self) -> dict:
        file = self.path / MANIFEST
        if not file.is_file():
            raise UserError(
                f"no prepared data in {str(self.path)!r}: make it with `mm1 data prepare --reader .. --input .. "
                f"--tokenizer .. --output {self.path}` (the demo corpus: `mm1 data demo`)"
            )
        try:
            manifest = json.loads(file.read_text())
            version, files = manifest["format"], manifest["files"]
            sizes = {name: entry["size"] for name, entry in files.items()}
            manifest["tokenizer"] = str(manifest["tokenizer"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} is damaged: prepare the data again") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.path} has data format {version}, this version reads {FORMAT_VERSION}: prepare it again"
            )
        for name, size in sizes.items():
            found = (self.path / name).stat().st_size if (self.path / name).is_file() else 0
            if found != size:
                raise UserError(f"{self.path / name} has {found} bytes instead of {size}: prepare the data again")
        return manifest


def _open(path: Path, tokenizer_fingerprint: str) -> IndexedSource:
    return IndexedSource(path, tokenizer_fingerprint=tokenizer_fingerprint)
