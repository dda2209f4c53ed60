"""Instruction data in LLaVA's JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_mm1.data.readers.base import RejectRecord, Row, Shard, name_below
from megatron_mm1.data.readers.fields import list_field, mapping, text_field
from megatron_mm1.data.readers.json_list import read_list
from megatron_mm1.data.readers.pictures import ImageFolder
from megatron_mm1.data.readers.rows import JSON_LINES, RowReader
from megatron_mm1.data.records import Control, Document, Image, Reason, Rejected, Text

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""LLaVA-1.5's, where a conversation has none of its own."""
IMAGE_MARK = "<image>"
END_OF_ANSWER = Control("</s>", trained=True)


class Llava(RowReader):
    """{"image": path or list of paths, "conversations": [{"from": "human" | "gpt", "value": text}, ..]}.

    Conversations are written as LLaVA-1.5 does (vicuna_v1): "<system> USER: <question> ASSISTANT: <answer></s>USER:
    ..", and the answers with their "</s>" are trained. Each `<image>` of a human turn is one of the images, in order. A
    first turn of the assistant's has no question and is left out, as LLaVA leaves it. Files are JSON lists or lines.

    Args:
        images: the folder of image files; left out: the data set's folder.
        place: of a turn's images, where they are marked or, as LLaVA-1.5 moves them, in front of the turn's text on a
            line of their own.
    """

    suffixes = (".json", *JSON_LINES)

    def __init__(self, path: Path, *, images: Path | None = None, place: Literal["marked", "front"] = "marked") -> None:
        super().__init__(path)
        self._folder = ImageFolder(images or (path if path.is_dir() else path.parent))
        self._in_front = place == "front"

    def shards(self) -> list[Shard]:
        lists = [file for file in self.files() if file.suffix == ".json"]
        whole = {file: Shard(name_below(self.path, file), file, file.stat().st_size) for file in lists}
        return [*whole.values(), *(shard for shard in super().shards() if shard.path not in whole)]

    def rows(self, shard: Shard) -> Iterator[Row | Rejected]:
        return read_list(shard) if shard.path.suffix == ".json" else super().rows(shard)

    def document(self, row: Any, key: str) -> Document:
        system, turns = _turns(list_field(row, "conversations"))
        paths = image_paths(mapping(row).get("image"))
        marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
        if marks != len(paths):
            raise RejectRecord(Reason.IMAGE_MARKS, f"{marks} marks, {len(paths)} images")
        images = iter([self._folder.read(path) for path in paths])
        parts: list[Text | Image | Control] = []
        before = f"{system} USER: "
        for question, answer in turns:
            parts += self._question(before, question, images)
            parts += [Text(f" {answer}"), END_OF_ANSWER]
            before = "USER: "
        return Document(tuple(parts), key)

    def _question(self, before: str, question: str, images: Iterator[Image]) -> list[Text | Image]:
        """A turn's text and images, none of it trained, up to the answer."""
        if self._in_front and IMAGE_MARK in question:
            marks = IMAGE_MARK * question.count(IMAGE_MARK)
            question = f"{marks}\n{question.replace(IMAGE_MARK, '').strip()}".strip()
        first, *others = f"{before}{question} ASSISTANT:".split(IMAGE_MARK)
        parts: list[Text | Image] = [Text(first, trained=False)]
        for text in others:
            parts.append(next(images))
            if text:
                parts.append(Text(text, trained=False))
        return parts


def _turns(conversation: list[Any]) -> tuple[str, list[tuple[str, str]]]:
    """The system's sentence and (question, answer) pairs.

    Raises:
        RejectRecord: turns are missing, or not by the human and the assistant by turns.
    """
    turns = [(text_field(turn, "from"), text_field(turn, "value").strip()) for turn in conversation]
    system = SYSTEM
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    if turns and turns[0][0] == "gpt":
        turns.pop(0)
    speakers = [speaker for speaker, _ in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        detail = f"expected human, gpt, human, gpt, ..; found {', '.join(speakers[:8])!a}"
        raise RejectRecord(Reason.WRONG_FIELDS, detail)
    texts = [text for _, text in turns]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def image_paths(field: Any) -> list[str]:
    """Of a record's field: none, one, or a list.

    Raises:
        RejectRecord: it is something else.
    """
    paths = [] if field is None else field if isinstance(field, list) else [field]
    if not all(isinstance(path, str) and path for path in paths):
        raise RejectRecord(Reason.WRONG_FIELDS, "image is neither a path nor a list of paths")
    return paths
