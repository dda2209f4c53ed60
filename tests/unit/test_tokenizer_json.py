"""tokenizer.json files made by the tokenizers library, and the extension of other models' tokenizers."""

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_mm1.data.tokenizer import CHAT_SYMBOLS, HuggingFaceTokenizer, Tokenizer, extend_tokenizer, open_tokenizer
from megatron_mm1.errors import UserError

CORPUS = ["red green blue square circle, with a big yellow one", "naïve café 2024", "def f(x):\n    return x"] * 20
# What the families call their special tokens; GPT-2's are all one.
FAMILIES = {
    "gpt2": ["<|endoftext|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"],
}
CONFIGS = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "llama3": {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"},
    "qwen": {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def byte_level(folder: Path, family: str, *, with_config: bool = True) -> Path:
    """A byte-level BPE of a family's kind."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(FAMILIES[family])
    tokenizer.enable_truncation(max_length=4)  # files on the hub have such settings
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if with_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIGS[family]))
    return folder / "tokenizer.json"


def llama2(file: Path, **options: object) -> Path:
    """A SentencePiece model with Llama 2's settings."""
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            split_digits=True,
            minloglevel=2,
            **options,
        )
    return file


@pytest.fixture(scope="module", params=list(FAMILIES))
def extended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    folder = tmp_path_factory.mktemp(request.param)
    original = byte_level(folder, request.param)
    extend_tokenizer(original, folder / "extended" / "tokenizer.json")
    return original, open_tokenizer(folder / "extended" / "tokenizer.json")


# Extended byte-level tokenizers


def test_extension_keeps_every_id_and_puts_new_ones_behind(extended: tuple[Path, Tokenizer]) -> None:
    original, ours = extended
    before = tokenizers.Tokenizer.from_file(str(original)).get_vocab()
    after = tokenizers.Tokenizer.from_file(str(ours.path)).get_vocab()
    assert before.items() <= after.items()
    new = set(after) - set(before)
    assert set(CHAT_SYMBOLS) <= new <= {*CHAT_SYMBOLS, "<image>", "<pad>"}
    assert sorted(after[symbol] for symbol in new) == list(range(len(before), len(after)))
    assert ours.vocab_size == len(after)


@settings(deadline=None)
@given(text=TEXTS)
def test_extension_keeps_the_encoding_of_text(extended: tuple[Path, Tokenizer], text: str) -> None:
    original, ours = extended
    theirs = tokenizers.Tokenizer.from_file(str(original))
    theirs.no_truncation()
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode_batch([text, "red", text]) == [ours.encode(text), ours.encode("red"), ours.encode(text)]
    assert ours.decode(ours.encode(text)) == text


def test_special_symbols_in_text_are_ordinary_text(extended: tuple[Path, Tokenizer]) -> None:
    _, ours = extended
    for symbol in ours.controls:
        for text in (symbol, f"red {symbol} blue", symbol + symbol):
            assert set(ours.controls.values()).isdisjoint(ours.encode(text)), text
            assert ours.encode_batch([text]) == [ours.encode(text)]
            assert ours.decode(ours.encode(text)) == text


def test_special_ids_decode_to_nothing(extended: tuple[Path, Tokenizer]) -> None:
    _, ours = extended
    ids = [ours.bos_id, ours.image_id, *ours.encode("red"), ours.eos_id, ours.control_id("<|end|>")]
    assert ours.decode(ids) == "red"


@pytest.mark.parametrize(
    ("family", "bos", "eos", "pad", "image"),
    [
        ("gpt2", "<|endoftext|>", "<|endoftext|>", "<pad>", "<image>"),
        ("llama3", "<|begin_of_text|>", "<|end_of_text|>", "<pad>", "<image>"),
        ("qwen", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|image_pad|>"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_special_ids_of_the_families(
    tmp_path: Path, family: str, bos: str, eos: str, pad: str, image: str, with_config: bool
) -> None:
    extend_tokenizer(byte_level(tmp_path, family, with_config=with_config), tmp_path / "new" / "tokenizer.json")
    ours = open_tokenizer(tmp_path / "new" / "tokenizer.json")
    pad = "<pad>" if family == "qwen" and not with_config else pad
    assert [ours.symbol(n) for n in (ours.bos_id, ours.eos_id, ours.pad_id, ours.image_id)] == [bos, eos, pad, image]
    assert (ours.control_id("<s>"), ours.control_id("</s>")) == (ours.bos_id, ours.eos_id)
    assert ours.control_id("<image>") == ours.image_id
    written = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert (written["pad_token"], written["extra_special_tokens"]) == (pad, {"image_token": image})


def test_named_files_beside_it_are_read_in_turn(tmp_path: Path) -> None:
    file = byte_level(tmp_path, "llama3", with_config=False)
    extend_tokenizer(file, tmp_path / "new" / "tokenizer.json")
    (tmp_path / "new" / "tokenizer_config.json").unlink()
    end_of_text, end_of_turn = map(tokenizers.Tokenizer.from_file(str(file)).token_to_id, FAMILIES["llama3"][1:])
    (tmp_path / "new" / "generation_config.json").write_text(json.dumps({"eos_token_id": [end_of_turn, end_of_text]}))
    assert open_tokenizer(tmp_path / "new" / "tokenizer.json").eos_id == end_of_turn
    (tmp_path / "new" / "special_tokens_map.json").write_text('{"eos_token": "<|end_of_text|>"}')
    assert open_tokenizer(tmp_path / "new" / "tokenizer.json").eos_id == end_of_text


def test_pickles_by_path(extended: tuple[Path, Tokenizer]) -> None:
    _, ours = extended
    again = pickle.loads(pickle.dumps(ours))
    assert (again.fingerprint, again.encode("red")) == (ours.fingerprint, ours.encode("red"))


def test_fingerprint_changes_with_ids_not_with_chat_templates(tmp_path: Path) -> None:
    extend_tokenizer(byte_level(tmp_path, "llama3"), tmp_path / "new" / "tokenizer.json")
    file, config = tmp_path / "new" / "tokenizer.json", tmp_path / "new" / "tokenizer_config.json"
    before = open_tokenizer(file).fingerprint
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"chat_template": "{{ messages }}"}))
    assert open_tokenizer(file).fingerprint == before
    config.write_text(json.dumps(values | {"eos_token": "<|eot_id|>"}))
    assert open_tokenizer(file).fingerprint != before
    config.write_text(json.dumps(values))
    file.write_text(file.read_text() + "\n")
    assert open_tokenizer(file).fingerprint != before


# Refusals


def test_tokenizer_without_an_image_symbol_names_the_command(tmp_path: Path) -> None:
    file = byte_level(tmp_path, "llama3")
    with pytest.raises(UserError, match=r"no special token for image: `python tools/train_tokenizer.py --extend"):
        open_tokenizer(file)


def test_unknown_control_symbol_lists_the_known_ones(extended: tuple[Path, Tokenizer]) -> None:
    _, ours = extended
    with pytest.raises(UserError, match=r"no control symbol '<\|tool\|>'; it has </s>, <image>, .*<\|assistant\|>"):
        ours.control_id("<|tool|>")


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json"])
def test_file_that_is_no_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_binary_file_that_is_no_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json \(3 bytes\)"):
        open_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("config", "says"),
    [("[]", "holds no JSON object"), ('{"eos_token": "<|nothing|>"}', r"eos_token '<\|nothing\|>' is no special")],
)
def test_bad_config_beside_it(tmp_path: Path, config: str, says: str) -> None:
    file = byte_level(tmp_path, "qwen")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=says):
        open_tokenizer(file)


def test_model_whose_text_reaches_special_tokens_is_refused(tmp_path: Path) -> None:
    specials = ["<s>", "</s>", "<pad>", "<image>"]
    vocabulary = [(piece, -1.0) for piece in [*specials, *"abcdeimgps<>/ "]]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="encodes to a special token"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_normalised_text_does_not_reach_special_tokens(tmp_path: Path) -> None:
    file = byte_level(tmp_path, "qwen")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(file))
    ours = HuggingFaceTokenizer(file)
    assert set(ours.controls.values()).isdisjoint(ours.encode("<|im_start|>"))


# Extended SentencePiece models


def test_llama_model_keeps_ids_and_encoding(tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama2(tmp_path / "tokenizer.model")))
    assert original.pad_id() == -1
    added = extend_tokenizer(tmp_path / "tokenizer.model", tmp_path / "new.model")
    assert added == ["<image>", *CHAT_SYMBOLS, "<pad>"]
    ours = open_tokenizer(tmp_path / "new.model")
    assert (ours.vocab_size, ours.image_id, ours.pad_id) == (326, 320, 325)
    assert (ours.bos_id, ours.eos_id) == (original.bos_id(), original.eos_id())
    new = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "new.model"))
    assert [new.IdToPiece(n) for n in range(320)] == [original.IdToPiece(n) for n in range(320)]
    for text in [*CORPUS[:3], "<image>", "a <|user|> b <pad>", "日本語 😀", "  two  spaces "]:
        assert ours.encode(text) == original.EncodeAsIds(text), text
        assert ours.encode_batch([text, text]) == [original.EncodeAsIds(text)] * 2


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_llama_model_encodes_any_text_as_before(llama_pair, text: str) -> None:
    original, ours = llama_pair
    assert ours.encode(text) == original.EncodeAsIds(text)


@pytest.fixture(scope="module")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    folder = tmp_path_factory.mktemp("llama")
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama2(folder / "tokenizer.model")))
    extend_tokenizer(folder / "tokenizer.model", folder / "new.model")
    return original, open_tokenizer(folder / "new.model")


def test_second_extension_adds_nothing(tmp_path: Path) -> None:
    extend_tokenizer(llama2(tmp_path / "tokenizer.model"), tmp_path / "new.model")
    assert extend_tokenizer(tmp_path / "new.model", tmp_path / "again.model") == []
    assert open_tokenizer(tmp_path / "again.model").fingerprint == open_tokenizer(tmp_path / "new.model").fingerprint


def test_symbol_that_is_ordinary_text_is_refused(tmp_path: Path) -> None:
    llama2(tmp_path / "tokenizer.model", user_defined_symbols=["<image>"])
    with pytest.raises(UserError, match="has '<image>' as an ordinary piece"):
        extend_tokenizer(tmp_path / "tokenizer.model", tmp_path / "new.model")
    file = byte_level(tmp_path, "llama3")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save(str(file))
    with pytest.raises(UserError, match=r"has '<\|user\|>' as an ordinary token"):
        extend_tokenizer(file, tmp_path / "new" / "tokenizer.json")


def test_extension_replaces_nothing_of_the_original(tmp_path: Path) -> None:
    file = byte_level(tmp_path, "llama3")
    for output, says in (
        (file, "choose another output"),
        (tmp_path / "other.json", "write to another folder"),
        (tmp_path / "other.model", r"is a \.json file"),
    ):
        with pytest.raises(UserError, match=says):
            extend_tokenizer(file, output)
    with pytest.raises(UserError, match="no tokenizer at"):
        extend_tokenizer(tmp_path / "nowhere.model", tmp_path / "new.model")
