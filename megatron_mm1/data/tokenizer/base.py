"""What the rest of the program asks of a tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm1.errors import UserError

IMAGE_SYMBOL = "<image>"
PAD_SYMBOL = "<pad>"
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Control symbols that mark whose turn of a conversation begins, and where it ends."""


@dataclass(frozen=True)
class SpecialIds:
    """The ids that the program puts between texts itself."""

    image: int
    pad: int
    bos: int
    eos: int


class Tokenizer(ABC):
    """Text -> ids and back. Special symbols have ids but no text encodes to them, so that a caption which happens to
    contain the characters "<image>" is ordinary text. Pickles by path.

    Attributes:
        path: the file it was read from.
        vocab_size: one more than the largest id, before any padding for tensor parallelism.
        image_id, pad_id, bos_id, eos_id: special ids. Where a model family has no symbol for the beginning of text or
            shares one between purposes, they are equal; the image's is always its own.
        controls: ids of all special symbols, by symbol.
        fingerprint: SHA-256 in hexadecimal of what the ids depend on. Prepared data and checkpoints keep it.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, special: SpecialIds, controls: Mapping[str, int], fingerprint: str
    ) -> None:
        self.path, self.vocab_size, self.controls, self.fingerprint = path, vocab_size, controls, fingerprint
        self.image_id, self.pad_id, self.bos_id, self.eos_id = special.image, special.pad, special.bos, special.eos

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never a special id, whatever the text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and which of the text's characters (start, stop) each token stands for."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids stand for nothing, bytes that are not UTF-8 become U+FFFD."""

    def control_id(self, symbol: str) -> int:
        """The id of a special symbol. "<s>", "</s>" and "<image>" are the beginning of text, its end and the image,
        whatever the tokenizer calls them.

        Raises:
            UserError: it has no such symbol.
        """
        known = {**self.controls, "<s>": self.bos_id, "</s>": self.eos_id, IMAGE_SYMBOL: self.image_id}
        if symbol not in known:
            raise UserError(
                f"{self.path} has no control symbol {symbol!r}; it has {', '.join(sorted(known))}. "
                f"{how_to_extend(self.path)} adds those for images and conversations"
            )
        return known[symbol]

    def symbol(self, special_id: int) -> str:
        """What the tokenizer itself calls a special id."""
        return next(symbol for symbol, token in self.controls.items() if token == special_id)


def how_to_extend(path: Path) -> str:
    """The command that adds missing symbols."""
    return f"`python tools/train_tokenizer.py --extend {path} --output FILE`"
