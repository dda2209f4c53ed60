"""SentencePiece models (.model)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_mm1.data.tokenizer.base import IMAGE_SYMBOL, SpecialIds, Tokenizer, how_to_extend
from megatron_mm1.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model whose image symbol is a *control* symbol.

    The fingerprint is the SHA-256 of the file.

    Raises:
        UserError: the file is not a SentencePiece model, or a special symbol is missing.
    """

    def __init__(self, path: Path) -> None:
        model = path.read_bytes()
        self._processor = parse_model(model, path)
        size: int = self._processor.GetPieceSize()
        controls = {self._processor.IdToPiece(n): n for n in range(size) if self._processor.IsControl(n)}
        special = SpecialIds(
            image=_required(
                controls.get(IMAGE_SYMBOL, -1), f"control symbol {IMAGE_SYMBOL!r}: {how_to_extend(path)} adds it", path
            ),
            pad=_required(self._processor.pad_id(), f"padding id: {how_to_extend(path)} adds it", path),
            bos=_required(self._processor.bos_id(), "beginning-of-text id: train it with one", path),
            eos=_required(self._processor.eos_id(), "end-of-text id: train it with one", path),
        )
        fingerprint = hashlib.sha256(model).hexdigest()
        super().__init__(path, vocab_size=size, special=special, controls=controls, fingerprint=fingerprint)

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.EncodeAsIds(list(texts), num_threads=1)  # callers run one process on each core

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._processor.Encode(text, out_type="offset_mapping")
        # Of the bytes of a character only the last one has it.
        return encoded["ids"], [(start, max(stop, start + 1)) for start, stop in encoded["offsets"]]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds([int(token) for token in ids])


def parse_model(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in the bytes of a `model` file at `path`.

    Raises:
        UserError: it is none.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model ({len(model)} bytes)") from error
    return processor


def _required(token: int, what: str, path: Path) -> int:
    if token < 0:
        raise UserError(f"{path} has no {what}")
    return token
