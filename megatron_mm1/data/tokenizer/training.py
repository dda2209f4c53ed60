"""Training a SentencePiece tokenizer: byte-pair encoding with byte fallback, so that any text can be encoded and read
back.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megatron_mm1.data.files import replace_file
from megatron_mm1.data.tokenizer.base import CHAT_SYMBOLS, IMAGE_SYMBOL, PAD_SYMBOL
from megatron_mm1.errors import UserError


def train_tokenizer(texts: Iterable[str], path: str | Path, *, vocab_size: int) -> None:
    """Train a BPE tokenizer on `texts` and write it to `path`; the same texts give the same file.

    Text is kept as it is: no normalisation, no prefix, all white space, "\\n" as a piece of its own, digits one by one.
    `IMAGE_SYMBOL` and `CHAT_SYMBOLS` are control symbols.

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
            control_symbols=[IMAGE_SYMBOL, *CHAT_SYMBOLS],
            user_defined_symbols=["\n"],
            pad_piece=PAD_SYMBOL,
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
