"""Readers turn a data set as people keep it into documents.

A reader is a class `Reader(path)` that iterates over `Document`, chosen by a name below or by its import path.
A row that cannot be used is counted under its reason in `skipped`, never passed over in silence.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_mm1.data.records import Document, Image, Text
from megatron_mm1.errors import UserError
from megatron_mm1.extension import resolve


class SkipRow(Exception):
    """This row cannot be used; the message is the reason it is counted under."""


class Reader(ABC):
    """Base of the built-in readers.

    Args:
        path: the data set's folder (or file).

    Attributes:
        skipped: how many rows could not be used, by reason.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UserError(f"no data set at {path}")
        self.path = path
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Document]:
        for key, row in self.rows():
            try:
                document = self.document(row, key)
            except SkipRow as reason:
                self.skipped[str(reason)] += 1
            else:
                yield document

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, Any]]:
        """(key, row) pairs in a fixed order."""

    @abstractmethod
    def document(self, row: Any, key: str) -> Document:
        """The document of one row.

        Raises:
            SkipRow: the row cannot be used.
        """


class JsonLinesReader(Reader):
    """One JSON object per line of `<folder>/<file_name>`; images are files below the folder."""

    file_name: str

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._root = path.resolve()
        self._read = lru_cache(maxsize=16)(self._read_image)  # rows about one image follow one another

    def rows(self) -> Iterator[tuple[str, Any]]:
        file = self.path / self.file_name
        if not file.is_file():
            raise UserError(f"no {self.file_name} in {self.path}")
        with file.open(encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield f"{self.file_name}:{number}", json.loads(line)
                    except ValueError:
                        self.skipped["not JSON"] += 1

    def field(self, row: Any, name: str) -> str:
        """A text field that is there and not blank."""
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise SkipRow(f"no text field {name!r}")
        return clean_text(value)

    def image(self, relative: str) -> Image:
        """The image file at `relative`, which must lie inside the data set's folder."""
        return self._read(relative)

    def _read_image(self, relative: str) -> Image:
        try:
            file = (self._root / relative).resolve()
            if not file.is_relative_to(self._root):
                raise SkipRow("image path leaves the folder")
            return Image(file.read_bytes())
        except (OSError, ValueError):
            raise SkipRow("image file missing or unreadable") from None


class Captions(JsonLinesReader):
    """`captions.jsonl`: {"image": relative path, "caption": text}. The image stands before its caption."""

    file_name = "captions.jsonl"

    def document(self, row: Any, key: str) -> Document:
        caption = self.field(row, "caption")
        return Document((self.image(self.field(row, "image")), Text(caption)), key)


class Questions(JsonLinesReader):
    """`questions.jsonl`: {"image", "question", "answer"}. Only the answer is trained."""

    file_name = "questions.jsonl"

    def document(self, row: Any, key: str) -> Document:
        question, answer = self.field(row, "question"), self.field(row, "answer")
        image = self.image(self.field(row, "image"))
        return Document((image, Text(question_prompt(question), trained=False), Text(question_answer(answer))), key)


class Interleaved(JsonLinesReader):
    """`documents.jsonl`: {"images": [path | null, ..], "texts": [text | null, ..]}, one per place (OBELICS)."""

    file_name = "documents.jsonl"

    def document(self, row: Any, key: str) -> Document:
        images, texts = (row.get(name) if isinstance(row, dict) else None for name in ("images", "texts"))
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            raise SkipRow("images and texts are not lists of one length")
        return Document(tuple(self._part(*pair) for pair in zip(images, texts, strict=True)), key)

    def _part(self, image: Any, text: Any) -> Text | Image:
        if isinstance(image, str) and text is None:
            return self.image(image)
        if isinstance(text, str) and image is None:
            return Text(clean_text(text))
        raise SkipRow("a place holds neither just an image nor just a text")


class PlainText(Reader):
    """A file, or a folder of files in name order: `.txt` with one document per line, `.jsonl` with {"text": ..}."""

    def rows(self) -> Iterator[tuple[str, Any]]:
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        files = [file for file in files if file.suffix in (".txt", ".jsonl") and file.is_file()]
        if not files:
            raise UserError(f"no .txt or .jsonl file in {self.path}")
        for file in files:
            with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{file.name}:{number}", (file.suffix, line)

    def document(self, row: Any, key: str) -> Document:
        suffix, line = row
        if suffix == ".txt":
            return Document((Text(clean_text(line.rstrip("\r\n"))),), key)
        try:
            value = json.loads(line)
        except ValueError:
            raise SkipRow("not JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise SkipRow("no text field 'text'")
        return Document((Text(clean_text(value["text"])),), key)


def clean_text(text: str) -> str:
    """`text` itself where it can be used.

    Raises:
        SkipRow: it is blank or was not valid UTF-8.
    """
    if not text.strip():
        raise SkipRow("blank text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipRow("text is not valid UTF-8") from None
    return text


def question_prompt(question: str) -> str:
    """What follows the image in a visual question [M]."""
    return f"Question: {question} Short answer:"


def question_answer(answer: str) -> str:
    """What follows the prompt."""
    return f" {answer}"


READERS: dict[str, type[Reader]] = {
    "captions": Captions,
    "interleaved": Interleaved,
    "questions": Questions,
    "text": PlainText,
}


def open_reader(name: str, path: Path) -> Any:
    """The reader called `name` (built-in, or the import path of a class) over `path`."""
    return resolve("data reader", name, READERS)(path)
