"""Which kind of tokenizer a file holds."""

from pathlib import Path

from megatron_mm1.data.tokenizer.base import Tokenizer
from megatron_mm1.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron_mm1.data.tokenizer.tokenizer_json import HuggingFaceTokenizer
from megatron_mm1.errors import UserError


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in `path`: Hugging Face's tokenizer.json, or else a SentencePiece model.

    Raises:
        UserError: no such file, neither of the two, or a special symbol is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no tokenizer at {str(path)!r}: set data.tokenizer (--tokenizer, where a checkpoint is asked) to a "
            "SentencePiece model file or a tokenizer.json (tools/train_tokenizer.py trains one)"
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
