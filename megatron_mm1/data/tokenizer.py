"""SentencePiece tokenizer: byte-pair encoding with byte fallback, so that any text can be encoded and read back."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megatron_mm1.data.files import replace_file
from megatron_mm1.errors import UserError

IMAGE_SYMBOL = "<image>"


class Tokenizer:
    """A SentencePiece model and its special ids.

    The image symbol is a *control* symbol: it has an id but no text encodes to it, so that a caption which happens to
    contain the characters "<image>" is ordinary text.

    Attributes:
        vocab_size: number of pieces, before any padding for tensor parallelism.
        image_id, pad_id, bos_id, eos_id: special ids.
        fingerprint: SHA-256 of the model file, in hexadecimal.

    Raises:
        UserError: no such file, not a SentencePiece model, or a special symbol is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"no tokenizer at {str(path)!r}: set data.tokenizer to a SentencePiece model file "
                "(tools/train_tokenizer.py trains one)"
            )
        model = self.path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{self.path} is not a SentencePiece model ({len(model)} bytes)") from error
        self.vocab_size: int = self._processor.GetPieceSize()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.image_id = self._control_id(IMAGE_SYMBOL)
        self.pad_id = self._special_id("padding", self._processor.pad_id())
        self.bos_id = self._special_id("beginning-of-text", self._processor.bos_id())
        self.eos_id = self._special_id("end-of-text", self._processor.eos_id())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never a special id, whatever the text."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids stand for nothing, bytes that are not UTF-8 become U+FFFD."""
        return self._processor.DecodeIds([int(token) for token in ids])

    def _control_id(self, symbol: str) -> int:
        token = self._processor.PieceToId(symbol)
        if token == self._processor.unk_id() or not self._processor.IsControl(token):
            raise UserError(f"{self.path} has no control symbol {symbol!r}: train the tokenizer with it")
        return token

    def _special_id(self, name: str, token: int) -> int:
        if token < 0:
            raise UserError(f"{self.path} has no {name} id: train the tokenizer with one")
        return token


def train_tokenizer(texts: Iterable[str], path: str | Path, *, vocab_size: int) -> None:
    """Train a BPE tokenizer on `texts` and write it to `path`; the same texts give the same file.

    Text is kept as it is: no normalisation, no prefix, all white space, "\\n" as a piece of its own, digits one by one.

    Raises:
        UserError: there is too little text for `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=[IMAGE_SYMBOL],
            user_defined_symbols=["\n"],
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 20,
            num_threads=4,  # written into the model file, so not the machine's core count
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {reason}") from error
    replace_file(Path(path), model.getvalue())
