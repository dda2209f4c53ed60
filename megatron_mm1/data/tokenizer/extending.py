"""A tokenizer of another model with the symbols that this program needs, behind the ids that it has."""

import json
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from megatron_mm1.data.files import replace_file
from megatron_mm1.data.tokenizer.base import CHAT_SYMBOLS, IMAGE_SYMBOL, PAD_SYMBOL
from megatron_mm1.data.tokenizer.opening import open_tokenizer
from megatron_mm1.data.tokenizer.sentencepiece_model import parse_model
from megatron_mm1.data.tokenizer.tokenizer_json import (
    CONFIG,
    named_specials,
    parse_tokenizer_json,
    read_json,
    special_tokens,
)
from megatron_mm1.errors import UserError

_CONTROL = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL


def extend_tokenizer(path: Path, output: Path) -> list[str]:
    """Write `path`'s tokenizer to `output` with the image, padding and chat symbols that it does not have yet.

    Ids and the encoding of text stay as they are. For a tokenizer.json, a tokenizer_config.json that says which
    special tokens are which is written beside it.

    Returns:
        The symbols that were added, in the order of their ids.

    Raises:
        UserError: `path` is no tokenizer, has such a symbol as ordinary text, or `output` would replace a
            tokenizer_config.json.
    """
    if not path.is_file():
        raise UserError(f"no tokenizer at {str(path)!r}")
    if output.resolve() == path.resolve():
        raise UserError(f"{output} is the tokenizer to extend: choose another output")
    if (output.suffix == ".json") != (path.suffix == ".json"):
        raise UserError(f"{output}: the extended tokenizer is a {path.suffix} file as {path} is")
    added = _extend_tokenizer_json(path, output) if path.suffix == ".json" else _extend_model(path, output)
    open_tokenizer(output)
    return added


def _extend_model(path: Path, output: Path) -> list[str]:
    content = path.read_bytes()
    has_pad = parse_model(content, path).pad_id() >= 0
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    wanted = [IMAGE_SYMBOL, *CHAT_SYMBOLS, *(() if has_pad else (model.trainer_spec.pad_piece,))]
    types = {piece.piece: piece.type for piece in model.pieces}
    for symbol in wanted:
        if types.get(symbol, _CONTROL) != _CONTROL:
            raise UserError(f"{path} has {symbol!r} as an ordinary piece, which text can encode to")
    added = [symbol for symbol in wanted if symbol not in types]
    for symbol in added:
        model.pieces.add(piece=symbol, score=0.0, type=_CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    if not has_pad:
        model.trainer_spec.pad_id = len(model.pieces) - 1
    replace_file(output, model.SerializeToString())
    return added


def _extend_tokenizer_json(path: Path, output: Path) -> list[str]:
    tokenizer = parse_tokenizer_json(path.read_bytes(), path)
    controls, vocabulary = special_tokens(tokenizer), tokenizer.get_vocab()
    roles = named_specials(controls, path)
    config = read_json(path.with_name(CONFIG))
    if output.with_name(CONFIG).exists():
        raise UserError(f"{output.with_name(CONFIG)} exists and would be replaced: write to another folder")
    wanted = list(CHAT_SYMBOLS)
    wanted += [symbol for role, symbol in {"image": IMAGE_SYMBOL, "pad": PAD_SYMBOL}.items() if role not in roles]
    for symbol in wanted:
        if symbol in vocabulary and symbol not in controls:
            raise UserError(f"{path} has {symbol!r} as an ordinary token, which text can encode to")
    added = [symbol for symbol in wanted if symbol not in controls]
    tokenizer.add_special_tokens([tokenizers.AddedToken(symbol, special=True, normalized=False) for symbol in added])
    if not vocabulary.items() <= tokenizer.get_vocab().items():
        raise UserError(f"{path} has gaps among its ids, which new symbols would fill: extend it by hand")
    roles = named_specials(special_tokens(tokenizer), path)
    names = {f"{role}_token": tokenizer.id_to_token(token) for role, token in roles.items()}
    config |= {name: symbol for name, symbol in names.items() if name != "image_token"}
    config["extra_special_tokens"] = {"image_token": names["image_token"]}
    replace_file(output, tokenizer.to_str().encode())
    replace_file(output.with_name(CONFIG), (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    return added
