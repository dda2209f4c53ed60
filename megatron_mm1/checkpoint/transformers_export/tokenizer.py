"""The tokenizer as transformers loads it: a tokenizer.json as it is, or one made from a SentencePiece model that gives
the same ids for the same text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_mm1.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_mm1.errors import UserError

_SPACE = "\u2581"  # SentencePiece's mark of a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_BPE = 2


def tokenizer_files(tokenizer: Tokenizer, *, max_length: int) -> dict[str, bytes | str]:
    """tokenizer.json and tokenizer_config.json for transformers, and a SentencePiece model for the way back.

    As in training, the name of a special symbol in text ("<image>", "</s>") is ordinary text: `split_special_tokens`.

    Args:
        max_length: positions of the model's sequence.

    Raises:
        UserError: a SentencePiece model does more than byte-pair encoding of the text as it is.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.symbol(tokenizer.bos_id),
        "eos_token": tokenizer.symbol(tokenizer.eos_id),
        "pad_token": tokenizer.symbol(tokenizer.pad_id),
        "extra_special_tokens": {"image_token": tokenizer.symbol(tokenizer.image_id)},
    }
    content = tokenizer.path.read_bytes()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config, indent=2)}
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    _check(model, tokenizer.path)
    config["unk_token"] = model.trainer_spec.unk_piece
    return {
        "tokenizer.model": content,
        "tokenizer.json": json.dumps(_tokenizer(model, bos=tokenizer.bos_id), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def _check(model: Any, path: Path) -> None:
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    faults = [
        text
        for text, present in (
            ("it is no byte-pair encoding", trainer.model_type != _BPE),
            ("it has no byte fallback", not trainer.byte_fallback),
            (f"it normalises text ({normalizer.name})", bool(normalizer.precompiled_charsmap)),
            ("it puts a space before the text", normalizer.add_dummy_prefix),
            ("it removes spaces", normalizer.remove_extra_whitespaces),
            ("it leaves spaces unmarked", not normalizer.escape_whitespaces),
            ("it marks spaces behind words", trainer.treat_whitespace_as_suffix),
            ("it has unused pieces", any(piece.type == _UNUSED for piece in model.pieces)),
            (
                "it has user-defined pieces of several characters",
                any(piece.type == _USER_DEFINED and len(piece.piece) > 1 for piece in model.pieces),
            ),
        )
        if present
    ]
    if faults:
        raise UserError(
            f"{path} cannot be exported as tokenizer.json: {'; '.join(faults)}. Supported is what "
            "tools/train_tokenizer.py trains"
        )


def _tokenizer(model: Any, *, bos: int) -> dict[str, Any]:
    special = [
        {
            "id": token,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, piece in enumerate(model.pieces)
        if piece.type in (_UNKNOWN, _CONTROL)
    ]
    begin = model.pieces[bos].piece
    text_only, pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text_only],
            "pair": [first, text_only, pair],
            "special_tokens": {begin: {"id": begin, "ids": [bos], "tokens": [begin]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: token for token, piece in enumerate(model.pieces)},
            "merges": [[left, right] for left, right in _merges(model)],
        },
    }


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first.

    SentencePiece merges the two neighbours that make the piece of the highest score, whatever the two are. User-defined
    pieces (here single characters) merge with nothing.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}

    def ways() -> Iterator[tuple[float, int, str, str]]:
        for piece, score in scores.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in scores and right in scores:
                    yield -score, cut, left, right

    return [(left, right) for _, _, left, right in sorted(ways())]
