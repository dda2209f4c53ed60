"""Web documents of text and images: OBELICS and MMC4."""

from pathlib import Path
from typing import Any, Literal

from megatron_mm1.data.filters import InterleavedFilters
from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import clean_text, list_field, mapping, parse_json
from megatron_mm1.data.readers.pictures import ImageFolder, ImageIndex
from megatron_mm1.data.readers.rows import JSON_LINES, RowReader
from megatron_mm1.data.records import Control, Document, Image, Reason, Text


class Obelics(RowReader):
    """Parallel lists `images` and `texts`: at each place one has an entry where the other has null.

    An image is a path below the image folder, a {bytes, path} struct, or the URL of a downloaded file. One that cannot
    be read leaves its place, with a count; the document stays. Blank texts are left out.

    Args:
        images: the folder of image files; left out: the data set's folder.
        image_index: paths of URLs, see `ImageIndex`.
    """

    filters = InterleavedFilters()
    columns = ("images", "texts", "metadata")

    def __init__(self, path: Path, *, images: Path | None = None, image_index: Path | None = None) -> None:
        super().__init__(path)
        self._folder = ImageFolder(images or (path if path.is_dir() else path.parent))
        self._index = ImageIndex(image_index) if image_index else None

    def document(self, row: Any, key: str) -> Document:
        images, texts = list_field(row, "images"), list_field(row, "texts")
        if len(images) != len(texts):
            raise RejectRecord(Reason.WRONG_FIELDS, f"{len(images)} images and {len(texts)} texts, one per place")
        urls = _image_urls(row.get("metadata"), len(images))
        parts: list[Text | Image | Control] = []
        dropped = []
        for image, text, url in zip(images, texts, urls, strict=True):
            if image is not None and text is not None:
                raise RejectRecord(Reason.WRONG_FIELDS, "a place holds an image and a text")
            if image is not None:
                try:
                    parts.append(self._folder.image(image, url, self._index))
                except RejectRecord as error:
                    dropped.append(error.reason)
            elif isinstance(text, str):
                parts += _texts(text)
            elif text is not None:
                raise RejectRecord(Reason.WRONG_FIELDS, f"a text of type {type(text).__name__}")
        return _with_text(Document(tuple(parts), key, tuple(dropped)))


class Mmc4(RowReader):
    """`text_list` of sentences and `image_info`, each image matched to one of them.

    Sentences are joined by spaces. An image without a sentence of its own in the list is left out, with a count, as is
    one whose file cannot be read; the images of one sentence keep their order in `image_info`.

    Args:
        images: the folder of image files (`image_name`); left out: the data set's folder.
        place: of an image, before or after its sentence.
    """

    filters = InterleavedFilters()
    suffixes = JSON_LINES

    def __init__(self, path: Path, *, images: Path | None = None, place: Literal["before", "after"] = "before") -> None:
        super().__init__(path)
        self._folder = ImageFolder(images or (path if path.is_dir() else path.parent))
        self._offset = 0 if place == "before" else 1

    def document(self, row: Any, key: str) -> Document:
        sentences = list_field(row, "text_list")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise RejectRecord(Reason.WRONG_FIELDS, "a sentence of text_list is no text")
        dropped = []
        placed: dict[int, list[Image]] = {}
        for info in list_field(row, "image_info"):
            try:
                sentence = _matched_sentence(info, len(sentences))
                image = self._folder.image(info.get("image_name"), _text_or_nothing(info.get("raw_url")))
            except RejectRecord as error:
                dropped.append(error.reason)
            else:
                placed.setdefault(sentence + self._offset, []).append(image)
        parts: list[Text | Image | Control] = []
        start = 0
        for place in sorted(placed):
            parts += [*_texts(" ".join(sentences[start:place])), *placed[place]]
            start = place
        parts += _texts(" ".join(sentences[start:]))
        return _with_text(Document(tuple(parts), key, tuple(dropped)))


def _matched_sentence(info: Any, num_sentences: int) -> int:
    index = mapping(info).get("matched_text_index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < num_sentences:
        raise RejectRecord(Reason.IMAGE_PLACE)
    return index


def _texts(text: str) -> list[Text]:
    return [Text(clean_text(text))] if text.strip() else []


def _with_text(document: Document) -> Document:
    if not any(isinstance(part, Text) for part in document.parts):
        raise RejectRecord(Reason.BLANK_TEXT, "no text in the document")
    return document


def _image_urls(metadata: Any, length: int) -> list[str]:
    """OBELICS's URL of each place; `metadata` is a list, or one as a JSON text, of what is known of each image."""
    try:
        entries = parse_json(metadata.encode()) if isinstance(metadata, str) else metadata
    except (RejectRecord, UnicodeEncodeError):
        entries = None
    if not isinstance(entries, list) or len(entries) != length:
        return [""] * length
    return [_text_or_nothing(entry.get("src")) if isinstance(entry, dict) else "" for entry in entries]


def _text_or_nothing(value: Any) -> str:
    return value if isinstance(value, str) else ""
