"""The text of tokens that come one by one: stop strings across tokens, characters in pieces, nothing taken back."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.inference.output import OutputText
from tests.corpora import small_tokenizer


def by_bytes(ids) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def by_pieces(*pieces: str):
    return lambda ids: "".join(pieces[token] for token in ids)


def fed(output: OutputText, ids) -> list[str]:
    """Pieces that a reader got, until the end."""
    pieces = []
    for token in ids:
        output.add(token)
        pieces.append(output.new_text())
        if output.stopped:
            break
    output.end()
    return [*pieces, output.new_text(is_final=True)]


def test_a_stop_string_may_begin_and_end_within_tokens():
    output = OutputText(by_pieces("one tw", "o th", "ree four"), ["two thr"])
    assert fed(output, [0, 1, 2]) == ["one ", "", "", ""]
    assert (output.text, output.stopped) == ("one ", True)


def test_the_first_of_several_stop_strings_counts():
    output = OutputText(by_pieces("a b c d"), ["d", "b", "c"])
    fed(output, [0])
    assert output.text == "a "


def test_the_beginning_of_a_stop_string_that_goes_on_otherwise_is_given_late():
    output = OutputText(by_pieces("yes", ", b", "ut", " if", ", but no"), [", but no"])
    assert fed(output, [0, 1, 2, 3, 4]) == ["yes", "", "", ", but if", "", ""]
    assert output.text == "yes, but if"


def test_an_unfinished_stop_string_is_text_in_the_end():
    output = OutputText(by_pieces("yes", ", a"), [", and"])
    assert fed(output, [0, 1]) == ["yes", "", ", a"]
    assert not output.stopped


def test_a_character_is_given_when_all_its_bytes_are_there():
    assert fed(OutputText(by_bytes), "aé".encode()) == ["a", "", "é", ""]


def test_bytes_that_never_become_a_character_are_given_in_the_end():
    output = OutputText(by_bytes)
    assert fed(output, b"a\xe2\x82") == ["a", "", "", "\ufffd"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_pieces_make_the_text_that_all_tokens_decode_to(tokenizer):
    """Random tokens, among them bytes and special ones, many more than are decoded at a time."""
    for seed in range(40):
        ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=150)
        output = OutputText(tokenizer.decode)
        assert "".join(fed(output, ids)) == tokenizer.decode(ids)


@given(text=st.text(alphabet="ab, ", min_size=1, max_size=30), stop=st.text(alphabet="ab, ", min_size=1, max_size=4))
def test_text_ends_where_the_stop_string_first_occurs(text, stop):
    output = OutputText(by_bytes, [stop])
    given_pieces = "".join(fed(output, text.encode()))
    assert output.text == given_pieces == text.split(stop)[0]
    assert output.stopped == (stop in text)
