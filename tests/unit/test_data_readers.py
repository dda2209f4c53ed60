"""What each reader makes of its files, and that no row disappears without a count."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mm1.data.readers import Reader, open_reader, question_answer, question_prompt
from megatron_mm1.data.records import Document, Image, Text
from megatron_mm1.errors import UserError
from tests.corpora import encoded, write_jsonl

PNG = encoded("PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    return tmp_path / "set"


def parts_of(reader: Reader) -> list[tuple[Text | Image, ...]]:
    return [document.parts for document in reader]


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
        ("captions", "{not json", "not JSON"),
        ("captions", ["a list"], "no text field 'caption'"),
        ("captions", {"image": "images/a.png"}, "no text field 'caption'"),
        ("captions", {"image": "images/a.png", "caption": 7}, "no text field 'caption'"),
        ("captions", {"image": "images/a.png", "caption": " \n"}, "blank text"),
        ("captions", {"image": "images/a.png", "caption": "\ud800"}, "text is not valid UTF-8"),
        ("captions", {"image": "images/none.png", "caption": "x"}, "image file missing or unreadable"),
        ("captions", {"image": "images", "caption": "x"}, "image file missing or unreadable"),
        ("captions", {"image": "a\0b", "caption": "x"}, "image file missing or unreadable"),
        ("captions", {"image": "../secret.png", "caption": "x"}, "image path leaves the folder"),
        ("captions", {"image": "/etc/passwd", "caption": "x"}, "image path leaves the folder"),
        ("captions", {"image": "link.png", "caption": "x"}, "image path leaves the folder"),
        ("questions", {"image": "images/a.png", "question": "q", "answer": ""}, "blank text"),
        ("interleaved", {"images": [None], "texts": []}, "images and texts are not lists of one length"),
        ("interleaved", {"images": "a", "texts": "b"}, "images and texts are not lists of one length"),
        ("interleaved", {"images": [None], "texts": [None]}, "a place holds neither just an image nor just a text"),
        (
            "interleaved",
            {"images": ["images/a.png"], "texts": ["x"]},
            "a place holds neither just an image nor just a text",
        ),
        ("text", {"txt": "x"}, "no text field 'text'"),
        ("text", "nonsense", "not JSON"),
    ],
)
def test_unusable_row_is_counted_under_its_reason(folder: Path, reader: str, row: object, reason: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
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
    opened = open_reader(reader, folder)
    assert len(parts_of(opened)) == 2
    assert dict(opened.skipped) == {reason: 1}


@pytest.mark.parametrize("name", ["captions", "questions", "interleaved", "text"])
def test_missing_files_are_a_users_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no .*jsonl"):
        list(open_reader(name, tmp_path))
    with pytest.raises(UserError, match="no data set at"):
        open_reader(name, tmp_path / "nowhere")


class Countdown:
    """A reader of the user's own: any class that takes a path and yields documents."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Document]:
        return (Document((Text(str(number)),), str(number)) for number in (3, 2, 1))


def test_reader_by_class_path(tmp_path: Path) -> None:
    reader = open_reader(f"{__name__}.Countdown", tmp_path)
    assert [document.key for document in reader] == ["3", "2", "1"]


def test_unknown_reader_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'captions'"):
        open_reader("caption", tmp_path)
