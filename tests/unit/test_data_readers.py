"""What the plain layouts become, that no row disappears without its reason, and how readers are chosen."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from megatron_mm1.data.readers import Reader, open_reader, question_answer, question_prompt
from megatron_mm1.data.readers.options import parse_options
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text
from megatron_mm1.errors import UserError
from tests.corpora import encoded, write_jsonl

PNG = encoded("PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    return tmp_path / "set"


def parts_of(reader: Reader) -> list[tuple[Text | Image | Control, ...]]:
    documents = list(reader)
    assert all(isinstance(document, Document) for document in documents), documents
    return [document.parts for document in documents if isinstance(document, Document)]


def test_caption_follows_its_image(folder: Path) -> None:
    write_jsonl(folder / "captions.jsonl", [{"image": "images/a.png", "caption": "a red square", "extra": 1}])
    assert parts_of(open_reader("captions", folder)) == [(Image(PNG), Text("a red square"))]


def test_only_the_answer_of_a_question_is_trained(folder: Path) -> None:
    write_jsonl(folder / "questions.jsonl", [{"image": "images/a.png", "question": "what color?", "answer": "red"}])
    (parts,) = parts_of(open_reader("questions", folder))
    assert parts == (Image(PNG), Text("Question: what color? Short answer:", trained=False), Text(" red"))
    assert parts[1:] == (Text(question_prompt("what color?"), trained=False), Text(question_answer("red")))


def test_interleaved_keeps_reading_order(folder: Path) -> None:
    image = "images/a.png"
    write_jsonl(
        folder / "documents.jsonl",
        [{"images": [None, image, image, None], "texts": ["before\n", None, None, "after\n"]}],
    )
    assert parts_of(open_reader("interleaved", folder)) == [(Text("before\n"), Image(PNG), Image(PNG), Text("after\n"))]


def test_text_files_in_name_order(folder: Path) -> None:
    (folder / "b.txt").write_text("three\r\n\n four \n")
    write_jsonl(folder / "a.jsonl", [{"text": "one\nmore"}, {"text": "two"}])
    texts = [part.text for (part,) in parts_of(open_reader("text", folder)) if isinstance(part, Text)]
    assert texts == ["one\nmore", "two", "three", " four "]


def test_a_single_text_file_is_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert len(parts_of(open_reader("text", tmp_path / "lines.txt"))) == 2


@pytest.mark.parametrize(
    ("reader", "row", "reason"),
    [
        ("captions", "{not json", Reason.NOT_JSON),
        ("captions", "[" * 100_000, Reason.NOT_JSON),
        ("captions", ["a list"], Reason.WRONG_FIELDS),
        ("captions", {"image": "images/a.png"}, Reason.WRONG_FIELDS),
        ("captions", {"image": "images/a.png", "caption": 7}, Reason.WRONG_FIELDS),
        ("captions", {"image": "images/a.png", "caption": " \n"}, Reason.BLANK_TEXT),
        ("captions", {"image": "images/a.png", "caption": "\ud800"}, Reason.NOT_UTF8),
        ("captions", {"image": "images/a.png", "caption": "a\0b"}, Reason.NUL_BYTES),
        ("captions", {"image": "images/none.png", "caption": "x"}, Reason.MISSING_IMAGE),
        ("captions", {"image": "images", "caption": "x"}, Reason.MISSING_IMAGE),
        ("captions", {"image": "pipe.png", "caption": "x"}, Reason.MISSING_IMAGE),
        ("captions", {"image": "loop.png", "caption": "x"}, Reason.MISSING_IMAGE),
        ("captions", {"image": "../secret.png", "caption": "x"}, Reason.OUTSIDE_FOLDER),
        ("captions", {"image": "/etc/passwd", "caption": "x"}, Reason.OUTSIDE_FOLDER),
        ("captions", {"image": "link.png", "caption": "x"}, Reason.OUTSIDE_FOLDER),
        ("questions", {"image": "images/a.png", "question": "q", "answer": ""}, Reason.BLANK_TEXT),
        ("interleaved", {"images": [None], "texts": []}, Reason.WRONG_FIELDS),
        ("interleaved", {"images": "a", "texts": "b"}, Reason.WRONG_FIELDS),
        ("interleaved", {"images": [None], "texts": [None]}, Reason.WRONG_FIELDS),
        ("interleaved", {"images": ["images/a.png"], "texts": ["x"]}, Reason.WRONG_FIELDS),
        ("text", {"txt": "x"}, Reason.WRONG_FIELDS),
        ("text", "nonsense", Reason.NOT_JSON),
    ],
)
def test_unusable_row_is_rejected_with_its_reason(folder: Path, reader: str, row: object, reason: Reason) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    name = {"interleaved": "documents", "text": "lines"}.get(reader, reader)
    good = {
        "image": "images/a.png",
        "caption": "c",
        "question": "q",
        "answer": "a",
        "text": "t",
        "images": [None],
        "texts": ["t"],
    }
    write_jsonl(folder / f"{name}.jsonl", [good, row, good])
    first, second, third = open_reader(reader, folder)
    assert isinstance(first, Document)
    assert isinstance(third, Document)
    assert isinstance(second, Rejected)
    assert (second.key, second.reason) == (f"{name}.jsonl@{len(json.dumps(good)) + 1}", reason)


def test_bytes_that_are_not_utf8_are_rejected_where_they_stand(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "caf\xc3\xa9"}\n')
    (folder / "b.txt").write_bytes(b"caf\xe9\ncaf\xc3\xa9\n")
    reasons = [item.reason if isinstance(item, Rejected) else item.parts for item in open_reader("text", folder)]
    assert reasons == [Reason.NOT_UTF8, (Text("caf\u00e9"),)] * 2


def test_an_image_mark_in_a_caption_is_text(folder: Path) -> None:
    write_jsonl(folder / "captions.jsonl", [{"image": "images/a.png", "caption": "an <image> of </s>"}])
    assert parts_of(open_reader("captions", folder)) == [(Image(PNG), Text("an <image> of </s>"))]


@pytest.mark.parametrize("name", ["captions", "questions", "interleaved", "text"])
def test_missing_files_are_a_users_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no .*jsonl"):
        list(open_reader(name, tmp_path))
    with pytest.raises(UserError, match="no data set at"):
        open_reader(name, tmp_path / "nowhere")


class Countdown:
    """A reader of the user's own: any class that takes a path and yields documents."""

    def __init__(self, path: Path, *, start: int = 3) -> None:
        self.path, self.start = path, start

    def __iter__(self) -> Iterator[Document | Rejected]:
        for number in range(self.start, 0, -1):
            yield Document((Text(str(number)),), str(number))
        yield Rejected("0", Reason.OTHER, "zero")


class Strings(Countdown):
    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        yield "no document"


def test_reader_by_class_path(tmp_path: Path) -> None:
    reader = open_reader(f"{__name__}.Countdown", tmp_path)
    assert [document.key for document in reader] == ["3", "2", "1", "0"]
    reader = open_reader(f"{__name__}.Countdown", tmp_path, {"start": "1"})
    (shard,) = reader.shards()
    assert [document.key for document in reader.read(shard)] == ["1", "0"]


def test_a_reader_of_something_else_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="yields a str"):
        list(open_reader(f"{__name__}.Strings", tmp_path))


def test_unknown_reader_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'captions'"):
        open_reader("caption", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"captoins": "txt"},
            r"no option 'captoins': its options are captions \(str; default None\); seed \(int",
        ),
        ({"seed": "one"}, r"seed='one' of reader 'webdataset' cannot be used"),
        ({"captions": "txt=-1"}, "positive weights"),
        ({"captions": "txt=1,txt=2"}, "different names"),
        ({"captions": "txt=nan"}, "positive weights"),
    ],
)
def test_a_wrong_option_is_a_users_error(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_reader("webdataset", tmp_path, options)


def test_options_are_parsed_by_their_annotations() -> None:
    class Reader:
        def __init__(
            self,
            path: Path,
            *,
            number: int,
            share: float = 0.5,
            flag: bool = False,
            file: Path | None = None,
            side: Literal["left", "right"] = "left",
        ) -> None: ...

    texts = {"number": "3", "share": "0.25", "flag": "yes", "file": "a/b", "side": "right"}
    parsed = {"number": 3, "share": 0.25, "flag": True, "file": Path("a/b"), "side": "right"}
    assert parse_options(Reader, "mine", texts) == parsed
    with pytest.raises(UserError, match="needs the option 'number'"):
        parse_options(Reader, "mine", {})
    with pytest.raises(UserError, match=r"side \(left or right; default left\)"):
        parse_options(Reader, "mine", {"number": "1", "side": "up"})
    with pytest.raises(UserError, match="flag='perhaps'"):
        parse_options(Reader, "mine", {"number": "1", "flag": "perhaps"})
