"""The plain layouts: a folder with one JSON lines file and its images, and files of text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mm1.data.readers.base import RejectRecord, Shard
from megatron_mm1.data.readers.fields import clean_text, decode_text, list_field, parse_json, text_field
from megatron_mm1.data.readers.pictures import ImageFolder
from megatron_mm1.data.readers.rows import JSON_LINES, PARQUET, RowReader
from megatron_mm1.data.records import Document, Image, Reason, Text
from megatron_mm1.errors import UserError


class JsonLinesReader(RowReader):
    """One JSON object per line of `<folder>/<file_name>`; images are files below the folder."""

    file_name: str

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not (path / self.file_name).is_file():
            raise UserError(f"no {self.file_name} in {path}")
        self.image: Callable[[str], Image] = ImageFolder(path).read

    def files(self) -> list[Path]:
        return [self.path / self.file_name]


class Captions(JsonLinesReader):
    """`captions.jsonl`: {"image": relative path, "caption": text}. The image stands before its caption."""

    file_name = "captions.jsonl"

    def document(self, row: Any, key: str) -> Document:
        caption = text_field(row, "caption")
        return Document((self.image(text_field(row, "image")), Text(caption)), key)


class Questions(JsonLinesReader):
    """`questions.jsonl`: {"image", "question", "answer"}. Only the answer is trained."""

    file_name = "questions.jsonl"

    def document(self, row: Any, key: str) -> Document:
        question, answer = text_field(row, "question"), text_field(row, "answer")
        return question_document(self.image(text_field(row, "image")), question, answer, key=key)


class Interleaved(JsonLinesReader):
    """`documents.jsonl`: {"images": [path | null, ..], "texts": [text | null, ..]}, one per place."""

    file_name = "documents.jsonl"

    def document(self, row: Any, key: str) -> Document:
        images, texts = list_field(row, "images"), list_field(row, "texts")
        if len(images) != len(texts) or not images:
            raise RejectRecord(Reason.WRONG_FIELDS, f"{len(images)} images and {len(texts)} texts, one per place")
        return Document(tuple(self._part(*pair) for pair in zip(images, texts, strict=True)), key)

    def _part(self, image: Any, text: Any) -> Text | Image:
        if isinstance(image, str) and text is None:
            return self.image(image)
        if isinstance(text, str) and image is None:
            return Text(clean_text(text))
        raise RejectRecord(Reason.WRONG_FIELDS, "a place holds neither just an image nor just a text")


class PlainText(RowReader):
    """Files of text: `.txt` with one document per line; JSON lines and Parquet with a text field.

    Args:
        text_field: the field (or column) of the text.
    """

    suffixes = (".txt", *JSON_LINES, *PARQUET)

    def __init__(self, path: Path, *, text_field: str = "text") -> None:
        super().__init__(path)
        self._field = text_field
        self.columns = (text_field,)

    def parse(self, line: bytes, shard: Shard) -> Any:
        return {self._field: decode_text(line)} if shard.path.suffix == ".txt" else parse_json(line)

    def document(self, row: Any, key: str) -> Document:
        return Document((Text(text_field(row, self._field)),), key)


def question_document(image: Image, question: str, answer: str, *, key: str) -> Document:
    """A visual question, of which only the answer is trained."""
    return Document((image, Text(question_prompt(question), trained=False), Text(question_answer(answer))), key)


def question_prompt(question: str) -> str:
    """What follows the image in a visual question [M]."""
    return f"Question: {question} Short answer:"


def question_answer(answer: str) -> str:
    """What follows the prompt."""
    return f" {answer}"
