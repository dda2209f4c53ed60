"""The SentencePiece tokenizer keeps any text and keeps its special ids to itself."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from megatron_mm1.errors import UserError
from tests.corpora import small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "\n\n a\tb\r\n",
        "12345",
        "naïve café",
        "日本語 😀👨‍👩‍👧",
        "\x00\x7f\u200b\ufeff",
        "ﬁ ½ Å",
        "\U0010ffff",
    ],
)
def test_text_survives_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_survives_but_for_sentencepiece_own_space(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["<image>", "an <image> here", "<s>", "</s>", "<pad>", "<unk>", "<image><image>"])
def test_special_symbols_in_text_are_ordinary_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not special_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert len(special_ids(tokenizer)) == 4
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.image_id, *tokenizer.encode("red"), tokenizer.eos_id]) == "red"


def test_digits_and_newlines_are_pieces_of_their_own(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2024\n\n")] == ["2", "0", "2", "4", "\n", "\n"]


def test_equal_text_gives_an_equal_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = small_tokenizer(tmp_path / "a"), small_tokenizer(tmp_path / "b")
    assert first.fingerprint == second.fingerprint


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere.model"):
        open_tokenizer(tmp_path / "nowhere.model")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x05abcde"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.model").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.model"):
        open_tokenizer(tmp_path / "broken.model")


def test_model_without_image_symbol(tmp_path: Path) -> None:
    texts = iter(["red green blue"] * 10)
    with (tmp_path / "plain.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=24, pad_id=3, minloglevel=2
        )
    with pytest.raises(UserError, match="no control symbol '<image>'"):
        open_tokenizer(tmp_path / "plain.model")


def test_too_little_text_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4096 pieces"):
        train_tokenizer(["abc"], tmp_path / "t.model", vocab_size=4096)
    assert list(tmp_path.iterdir()) == []
