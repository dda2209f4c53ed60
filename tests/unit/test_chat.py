"""Conversations through chat templates: ids and trained tokens are transformers', and no text becomes a symbol."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_mm1.data.chat import IMAGE, OWN_TEMPLATE, ChatTemplate
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.data.source import IndexedSource
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.errors import UserError
from tests.corpora import encoded

CORPUS = [
    "What is in the picture? A red square.\n\nIt is big, and so on.",
    "naïve café 2024 ☃",
    "USER: ASSISTANT:",
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
QWEN = (
    "{% for message in messages %}\n"
    "    {%- if message['role'] == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\\n' }}\n"
    "        {%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\n"
    "        {{- '\\n' }}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }} "
    "{% elif message['role'] == 'user' %}USER: {{ message['content'] | trim }} ASSISTANT:"
    "{% else %}{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GLUED = (  # nothing between what is trained and what is not: a token may be of both
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{{ eos_token }}"
)
TEMPLATES = {"qwen": QWEN, "vicuna": VICUNA, "glued": GLUED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of Qwen's kind, with an image symbol."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(folder / "tokenizer.json")


def conversation(*turns: str, system: str | None = None, image: Any = None) -> dict[str, Any]:
    """A record of LLaVA's; turns by the human and the assistant, one after the other."""
    speakers = ("human", "gpt")
    values = [{"from": speakers[number % 2], "value": turn} for number, turn in enumerate(turns)]
    if system is not None:
        values.insert(0, {"from": "system", "value": system})
    return {"conversations": values} | ({} if image is None else {"image": image})


CONVERSATIONS = {
    "one turn": conversation("What is it?", "A red square."),
    "system and turns": conversation("Hello", "Hi.", "And?", "\n\nSo on, café ☃.", system="Be brief. "),
    "images": conversation("<image>\nWhat is it?", "A.", "and <image> or <image>?", "B.", image=["a.png"] * 3),
    "white space": conversation("  a \n", " \n b \n "),
    "a token of question and answer": conversation("a squ", "are is big"),
    "an image at both ends": conversation("<image>", "x", "y<image>", "z", image=["a.png", "a.png"]),
}


def read(tmp_path: Path, folder: Path, template: str, *records: dict[str, Any]) -> list[Document | Rejected]:
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "chats.json").write_text(json.dumps(records))
    (tmp_path / "template.jinja").write_text(template)
    options = {"template": str(tmp_path / "template.jinja"), "images": str(tmp_path)}
    return list(open_reader("chat", tmp_path / "chats.json", options, tokenizer=folder / "tokenizer.json"))


def transformers_ids(folder: Path, template: str, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and assistant mask of transformers."""
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    encoding = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoding["input_ids"], encoding["assistant_masks"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prepared_tokens_and_trained_ones_are_transformers(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, template: str, name: str
) -> None:
    record = CONVERSATIONS[name]
    documents = read(tmp_path, folder, TEMPLATES[template], record)
    prepare(documents, tokenizer=tokenizer, output=tmp_path / "prepared")
    piece = IndexedSource(tmp_path / "prepared", tokenizer_fingerprint=tokenizer.fingerprint).piece(0)
    ids, mask = transformers_ids(folder, TEMPLATES[template], record)
    assert piece.tokens.tolist() == ids
    assert piece.trained.astype(int).tolist() == mask
    assert 0 < sum(mask) < len(mask) and len(piece.images) == ids.count(tokenizer.image_id)


PLAIN = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1)
SPELLED = st.lists(st.sampled_from([*SPECIAL, "<", "<|im_", "end|>", "a", " ", "<image>"]), min_size=1).map("".join)


@settings(max_examples=60)
@given(question=PLAIN | SPELLED, answer=PLAIN | SPELLED)
def test_nothing_that_is_said_becomes_a_symbol(tokenizer: Tokenizer, question: str, answer: str) -> None:
    """And all of it is there."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = ChatTemplate(QWEN, tokenizer, origin="test").render(messages)
    controls = [part.symbol for part in parts if isinstance(part, Control)]
    assert controls == ["<|im_start|>", "<|im_end|>"] * 2
    texts = [part.text for part in parts if isinstance(part, Text)]
    assert "".join(texts) == f"user\n{question}\nassistant\n{answer}\n"


def test_own_template_trains_answers_and_their_end(demo_corpus: Path) -> None:
    tokenizer = open_tokenizer(demo_corpus / "tokenizer.model")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert ChatTemplate(OWN_TEMPLATE, tokenizer, origin="ours").render(messages) == [
        Control("<|user|>"),
        Text("Hi", trained=False),
        Control("<|end|>"),
        Control("<|assistant|>"),
        Text("Hello", trained=True),
        Control("<|end|>", trained=True),
        Control("</s>"),
    ]


@pytest.mark.parametrize("template", ["qwen", "vicuna"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_model_is_asked_as_it_was_trained(tokenizer: Tokenizer, template: str, name: str) -> None:
    """Parts in front of the last answer, whatever the template does about generation prompts."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [
        {"role": roles[turn["from"]], "content": turn["value"].replace("<image>", IMAGE)}
        for turn in CONVERSATIONS[name]["conversations"]
    ]
    written = ChatTemplate(TEMPLATES[template], tokenizer, origin="test")
    whole, asked = written.render(messages), written.ask(messages[:-1])
    assert asked[:-1] == whole[: len(asked) - 1]
    last, answered = asked[-1], whole[len(asked) - 1]
    assert isinstance(last, Text) and isinstance(answered, Text)  # which goes on with the answer
    assert answered.text.startswith(last.text)
    assert answered.text.removeprefix(last.text).strip().startswith(messages[-1]["content"].strip())
    assert written.ends == {"qwen": ("<|im_end|>",), "vicuna": ("<|endoftext|>",)}[template]


def test_own_template_asks_up_to_the_answer(demo_corpus: Path) -> None:
    written = ChatTemplate(OWN_TEMPLATE, open_tokenizer(demo_corpus / "tokenizer.model"), origin="ours")
    asked = [Control("<|user|>"), Text("Hi", trained=False), Control("<|end|>"), Control("<|assistant|>")]
    assert written.ask([{"role": "user", "content": "Hi"}]) == asked
    assert written.ends == ("<|end|>",)


@pytest.mark.parametrize(
    "block",
    [
        "{% generation %}<|im_start|>assistant\n{{ content }}<|im_end|>{% endgeneration %}",
        "<|im_start|>{% generation %}assistant\n{{ content }}{% endgeneration %}{% generation %}<|im_end|>"
        "{% endgeneration %}",
        "<|im_start|>assistant\n{% generation %} {{ content }}<|im_end|>{% endgeneration %}<|im_start|>",
        "<|im_start|>assistant\n {% generation %}{{ content }}<|im_end|>{% endgeneration %}",
    ],
    ids=["with its header", "in two", "behind a space", "a space in front"],
)
def test_whatever_is_trained_beside_the_answer_a_model_is_asked_up_to_it(tokenizer: Tokenizer, block: str) -> None:
    source = (
        "{% for message in messages %}{% set content = message.content %}"
        "{% if message.role == 'user' %}Q {{ content }}\n{% else %}" + block + "{% endif %}{% endfor %}"
    )
    written = ChatTemplate(source, tokenizer, origin="test")
    asked = written.ask([{"role": "user", "content": "Hi"}])
    said = "".join(part.symbol if isinstance(part, Control) else part.text for part in asked)
    assert said == "Q Hi\n<|im_start|>assistant\n"
    assert written.ends == ("<|im_end|>",)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("{{ content }}{% generation %}<|im_end|>{% endgeneration %}", "does not say what the assistant says"),
        ("{% generation %}{{ content }}{{ content }}{% endgeneration %}", "writes an answer 2 times"),
        ("{% generation %}{% endgeneration %}", "writes an answer 0 times"),
    ],
)
def test_a_template_must_train_what_is_answered(tokenizer: Tokenizer, block: str, reason: str) -> None:
    source = "{% for message in messages %}{% set content = message.content %}" + block + "{% endfor %}"
    with pytest.raises(UserError, match=reason):
        ChatTemplate(source, tokenizer, origin="test")


@pytest.mark.parametrize("text", ["A naïve ☃ cat", " a", "x\n\ny", "日本"])
def test_offsets_of_sentencepiece_cover_the_text(demo_corpus: Path, text: str) -> None:
    tokenizer = open_tokenizer(demo_corpus / "tokenizer.model")
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert {place for start, stop in offsets for place in range(start, stop)} == set(range(len(text)))
    assert all(start < stop for start, stop in offsets)


def one(items: list[Document | Rejected]) -> Document | Rejected:
    [item] = items
    return item


def test_images_stand_where_they_are_marked_and_answers_may_spell_the_mark(tmp_path: Path, folder: Path) -> None:
    record = conversation("a <image> b", "an <image>", image="a.png")
    document = one(read(tmp_path, folder, VICUNA, record))
    assert isinstance(document, Document) and document.complete
    kinds = [type(part) for part in document.parts]
    assert kinds == [Control, Text, Image, Text, Control]
    assert document.parts[3] == Text(" b ASSISTANT: an <image>", trained=False, spans=((13, 24),))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (conversation("<image>", "a"), Reason.IMAGE_MARKS),
        (conversation("a", "b", image="a.png"), Reason.IMAGE_MARKS),
        (conversation("a", "b", image="../a.png"), Reason.IMAGE_MARKS),
        (conversation("<image>", "b", image="missing.png"), Reason.MISSING_IMAGE),
        (conversation("only a question"), Reason.WRONG_FIELDS),
        ({"conversations": [{"from": "robot", "value": "x"}]}, Reason.WRONG_FIELDS),
        ({"conversations": "x"}, Reason.WRONG_FIELDS),
        (conversation("a \U0010fff0", "b"), Reason.OTHER),
    ],
)
def test_records_that_cannot_be_used_are_told(
    tmp_path: Path, folder: Path, record: dict[str, Any], reason: Reason
) -> None:
    item = one(read(tmp_path, folder, QWEN, record))
    assert isinstance(item, Rejected) and item.reason == reason


def test_a_template_that_refuses_or_loses_an_image_rejects_the_record(tmp_path: Path, folder: Path) -> None:
    strict = QWEN + "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    item = one(read(tmp_path, folder, strict, conversation("a", "b", "c", "d")))
    assert isinstance(item, Rejected) and item.reason == Reason.CHAT_TEMPLATE and "one turn only" in item.detail
    forgetful = QWEN.replace("message['content'] + '<|im_end|>\\n'", "'<|im_end|>\\n'")
    item = one(read(tmp_path, folder, forgetful, conversation("<image>", "b", image="a.png")))
    assert isinstance(item, Rejected) and "0 of 1 images" in item.detail


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "the template writes an answer 0 times"),
        ("{% for message in messages %}", "is no chat template"),
        ("{{ messages.append(1) }}", "is no chat template: SecurityError"),
    ],
)
def test_templates_that_cannot_be_used_are_told(tmp_path: Path, folder: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, folder, template, conversation("a", "b"))


def test_the_template_is_found_beside_the_tokenizer(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "chats.json").write_text(json.dumps([conversation("a", "b")]))
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no chat template: there is no chat_template\.jinja .*--option template=FILE"):
        open_reader("chat", tmp_path / "chats.json", tokenizer=copy)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": QWEN}))
    [document] = open_reader("chat", tmp_path / "chats.json", tokenizer=copy)
    assert isinstance(document, Document) and document.parts[0] == Control("<|im_start|>")
    (tmp_path / "chat_template.jinja").write_text(VICUNA)
    [document] = open_reader("chat", tmp_path / "chats.json", tokenizer=copy)
    assert isinstance(document, Document) and document.parts[0] == Control("<|endoftext|>")


def test_a_trained_token_needs_one_character_of_a_span(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "a big square"
    ids, offsets = tokenizer.encode_with_offsets(text)
    document = Document((Text(text, trained=False, spans=((5, 7),)),), "x", complete=True)
    prepare([document], tokenizer=tokenizer, output=tmp_path / "prepared")
    piece = IndexedSource(tmp_path / "prepared", tokenizer_fingerprint=None).piece(0)
    assert piece.tokens.tolist() == ids
    assert piece.trained.tolist() == [bool(set(range(start, stop)) & {5, 6}) for start, stop in offsets]
    assert isinstance(piece.trained, np.ndarray) and piece.trained.any() and not piece.trained.all()
