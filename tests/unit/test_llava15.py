"""LLaVA-1.5's chat templates against its formats spelled out, and what its two stages need besides."""

from pathlib import Path
from typing import Any

import pytest

from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.data.tokenizer.extending import extend_tokenizer
from tests.corpora import encoded, write_jsonl
from tests.llava15 import PIECES, SYSTEM, TEMPLATES, VOCABULARY, write_tokenizer

BEGIN, END = Control("<s>"), Control("</s>", trained=True)
PICTURE = encoded()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder / "llama.model")
    assert len(extend_tokenizer(folder / "llama.model", folder / "tokenizer.model")) == VOCABULARY - PIECES
    return folder / "tokenizer.model"


def asked(text: str) -> Text:
    return Text(text, trained=False)


def answered(before: str, answer: str) -> Text:
    """One run of text whose end is trained."""
    return Text(before + answer, trained=False, spans=((len(before), len(before) + len(answer)),))


def read(tmp_path: Path, tokenizer: Path, template: str, *turns: str, image: bool = False) -> Document | Rejected:
    """One record of LLaVA's JSON; a turn is "human: ..", "gpt: .." or "system: ..".."""
    conversations = [dict(zip(("from", "value"), turn.split(": ", 1), strict=True)) for turn in turns]
    record: dict[str, Any] = {"id": "1", "conversations": conversations} | ({"image": "a.png"} if image else {})
    (tmp_path / "a.png").write_bytes(PICTURE)
    write_jsonl(tmp_path / "chats.jsonl", [record])
    options = {"template": str(TEMPLATES / f"{template}.jinja")}
    [item] = open_reader("chat", tmp_path / "chats.jsonl", options, tokenizer=tokenizer)
    return item


@pytest.mark.parametrize("question", ["<image>\nRender a clear and concise summary.", "What is this?\n<image>"])
def test_alignment_sees_the_image_and_its_caption(tmp_path: Path, tokenizer: Path, question: str) -> None:
    document = read(tmp_path, tokenizer, "plain", f"human: {question}", "gpt: a red square", image=True)
    assert isinstance(document, Document) and document.complete
    assert document.parts == (BEGIN, Image(PICTURE), Text("a red square\n"))


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it? <image>"])
def test_an_image_goes_in_front_of_its_question(tmp_path: Path, tokenizer: Path, question: str) -> None:
    turns = (f"human: {question}", "gpt: A square.", "human: Its colour? ", "gpt: red")
    document = read(tmp_path, tokenizer, "vicuna_v1", *turns, image=True)
    assert isinstance(document, Document) and document.complete
    assert document.parts == (
        BEGIN,
        asked(f"{SYSTEM} USER: "),
        Image(PICTURE),
        answered("\nWhat is it? ASSISTANT:", " A square."),
        END,
        answered("USER: Its colour?  ASSISTANT:", " red"),
        END,
    )


@pytest.mark.parametrize("begin", [(), ("gpt: Hello.",)])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_without_images(
    tmp_path: Path, tokenizer: Path, system: str | None, begin: tuple[str, ...]
) -> None:
    """A first turn of the assistant's is left out; a system's own words take the place of Vicuna's."""
    first = () if system is None else (f"system: {system}",)
    document = read(tmp_path, tokenizer, "vicuna_v1", *first, *begin, "human: Hi", "gpt: Hello!")
    assert isinstance(document, Document)
    assert document.parts == (BEGIN, answered(f"{system or SYSTEM} USER: Hi ASSISTANT:", " Hello!"), END)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("plain", ("human: a", "gpt: b", "human: c", "gpt: d"), "one question and its answer"),
        ("vicuna_v1", ("human: a", "human: b", "gpt: c"), "do not take turns"),
        ("vicuna_v1", ("human: a", "gpt: b", "human: c"), "has no answer"),
    ],
)
def test_other_conversations_are_rejected(
    tmp_path: Path, tokenizer: Path, template: str, turns: tuple[str, ...], message: str
) -> None:
    item = read(tmp_path, tokenizer, template, *turns)
    assert isinstance(item, Rejected) and item.reason == Reason.CHAT_TEMPLATE and message in item.detail
