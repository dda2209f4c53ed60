"""Hugging Face's tokenizer.json, through their `tokenizers` library."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron_mm1.data.tokenizer.base import IMAGE_SYMBOL, PAD_SYMBOL, SpecialIds, Tokenizer, how_to_extend
from megatron_mm1.errors import UserError

# What families call their symbols where no file beside tokenizer.json says so, the likeliest first.
_CONVENTIONS = {
    "image": (IMAGE_SYMBOL, "<|image|>", "<|image_pad|>", "<image_soft_token>", "[IMG]"),
    "pad": (PAD_SYMBOL, "<|finetune_right_pad_id|>", "<|pad|>", "[PAD]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
}
CONFIG = "tokenizer_config.json"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Which of its special tokens begin, end and pad a text is read from tokenizer_config.json,
    special_tokens_map.json or generation_config.json beside it, and otherwise from the usual names.

    A family without a token for the beginning of text (Qwen's) has that of its end there, as GPT-2 does.
    The fingerprint is the SHA-256 of tokenizer.json followed by the four special ids: a chat template that changes in
    the files beside it changes nothing.

    Raises:
        UserError: the file is no tokenizer.json, a special token is missing, or text can encode to one.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self._tokenizer = parse_tokenizer_json(content, path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        controls = special_tokens(self._tokenizer)
        special = _special_ids(controls, path)
        ids = json.dumps([special.image, special.pad, special.bos, special.eos]).encode()
        super().__init__(
            path,
            vocab_size=max(self._tokenizer.get_vocab().values()) + 1,
            special=special,
            controls=controls,
            fingerprint=hashlib.sha256(content + ids).hexdigest(),
        )
        self._check_special_tokens_are_out_of_reach()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def _check_special_tokens_are_out_of_reach(self) -> None:
        """Whole pieces of a unigram or word model may be special tokens, which text that spells them then becomes."""
        ids = set(self.controls.values())
        for symbol in self.controls:
            if not ids.isdisjoint(self.encode(symbol)) or not ids.isdisjoint(self.encode(f"a {symbol} b")):
                raise UserError(f"{self.path}: text that contains {symbol!r} encodes to a special token")


def parse_tokenizer_json(content: bytes, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in the `content` of a file at `path`.

    Raises:
        UserError: it is none.
    """
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises this very class
        raise UserError(f"{path} is not a tokenizer.json ({len(content)} bytes): {error}") from error


def special_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """Ids of all special tokens, by what they are called."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in sorted(added.items()) if token.special}


def named_specials(controls: Mapping[str, int], path: Path) -> dict[str, int]:
    """Ids of those of "image", "pad", "bos" and "eos" that can be told."""
    stated = _stated(path, controls)
    usual = {role: _first(names, controls) for role, names in _CONVENTIONS.items()}
    found = {role: stated.get(role, usual[role]) for role in _CONVENTIONS}
    return {role: token for role, token in found.items() if token is not None}


def _special_ids(controls: Mapping[str, int], path: Path) -> SpecialIds:
    found = named_specials(controls, path)
    if "eos" in found:
        found.setdefault("bos", found["eos"])
    for role, what in {"eos": "end of text", "image": "image", "pad": "padding"}.items():
        if role not in found:
            how = f"name it as eos_token in {CONFIG} beside it" if role == "eos" else f"{how_to_extend(path)} adds it"
            raise UserError(f"{path} has no special token for {what}: {how}")
    if found["image"] in (found["pad"], found["bos"], found["eos"]):
        raise UserError(f"{path}: the image's special token has another purpose too (id {found['image']})")
    return SpecialIds(**found)


def _stated(path: Path, controls: Mapping[str, int]) -> dict[str, int]:
    """What the files beside tokenizer.json say, the first of them that does."""
    found: dict[str, int] = {}
    for name in (CONFIG, "special_tokens_map.json"):
        values = read_json(path.with_name(name))
        extra = values.get("extra_special_tokens")
        values = {**(extra if isinstance(extra, dict) else {}), **values}
        for role in _CONVENTIONS:
            token = values.get(f"{role}_token")
            symbol = token.get("content") if isinstance(token, dict) else token
            if symbol is None:
                continue
            if symbol not in controls:
                raise UserError(f"{path.with_name(name)}: {role}_token {symbol!r} is no special token of {path.name}")
            found.setdefault(role, controls[symbol])
    generation = read_json(path.with_name("generation_config.json"))
    for role in ("bos", "eos", "pad"):
        number = generation.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number in controls.values():
            found.setdefault(role, number)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, or an empty one where there is no such file.

    Raises:
        UserError: it holds no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object")
    return values


def _first(names: Iterable[str], controls: Mapping[str, int]) -> int | None:
    return next((controls[name] for name in names if name in controls), None)
