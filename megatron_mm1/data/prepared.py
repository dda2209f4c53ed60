"""The layout of a prepared data set, which `mm1 data prepare` writes and training reads at random.

manifest.json             format, counts, what was left out, tokenizer fingerprint, origin, and the parts with sizes and
                          SHA-256 of their files
part-00000/tokens.bin     int32, all documents one after another; each image is one image id
part-00000/tokens.idx     megatron-core's index of it: `IndexedDataset` reads the two
part-00000/trained.bin    uint8, 1 where the token is a target of the loss
part-00000/documents.npy  int64 [D + 1, 3], where each document's tokens, images and key start
part-00000/images.npy     int64 [I, 6], columns IMAGE_COLUMNS
part-00000/images.bin     the encoded images
part-00000/keys.bin       UTF-8, where each document came from
part-00000/quarantine.jsonl  key, reason, detail and shard of every record that could not be used
part-00000/summary.json   what the manifest's counts add up from
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mm1.errors import UserError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
DOCUMENT_COLUMNS = ("token", "image", "key")
IMAGE_COLUMNS = ("offset", "length", "height", "width", "position", "checksum")
"""Byte range in images.bin, px as the file's header has them, place among the document's tokens, and XXH3-64."""
PART_FILES = ("tokens.bin", "tokens.idx", "trained.bin", "documents.npy", "images.npy", "images.bin", "keys.bin")


def part_name(number: int) -> str:
    return f"part-{number:05d}"


@dataclass(frozen=True)
class Part:
    """One part of a prepared data set.

    Attributes:
        name: its folder.
        documents, images: how many.
        files: {"size", "sha256"} by name.
    """

    name: str
    documents: int
    images: int
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        counts: documents, images, tokens, trained_tokens.
        records: "read", "written", and "rejected" by reason: the first is the sum of the others.
        images: "seen" in the documents written, "written", and "dropped" by reason, likewise.
        tokenizer: fingerprint.
        origin: what it was made from.
    """

    counts: Mapping[str, int]
    records: Mapping[str, Any]
    images: Mapping[str, Any]
    tokenizer: str
    origin: Mapping[str, Any]
    parts: tuple[Part, ...]

    def to_json(self) -> str:
        values = vars(self) | {"format": FORMAT_VERSION, "parts": [vars(part) for part in self.parts]}
        return json.dumps(values, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, *, origin: str) -> "Manifest":
        """Read `to_json`'s text; `origin` names it in messages.

        Raises:
            UserError: it is damaged or of another format.
        """
        try:
            values = json.loads(text)
            version = values.pop("format")
            if version == FORMAT_VERSION:
                parts = tuple(Part(**part) for part in values.pop("parts"))
                sizes = [int(file["size"]) for part in parts for file in part.files.values()]
                if any(size < 0 for size in sizes) or any(set(part.files) != set(PART_FILES) for part in parts):
                    raise ValueError
                return Manifest(parts=parts, **values)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{origin} is damaged: prepare the data again") from None
        raise UserError(f"{origin} has data format {version}, this version reads {FORMAT_VERSION}: prepare it again")
