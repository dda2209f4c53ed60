"""LLaVA's JSON through a chat template."""

from pathlib import Path
from typing import Any

from megatron_mm1.data.chat import IMAGE, IMAGE_SLOT, MARKS, ChatTemplate, TemplateError, find_template, read_template
from megatron_mm1.data.readers.base import RejectRecord
from megatron_mm1.data.readers.fields import list_field, mapping, text_field
from megatron_mm1.data.readers.llava import IMAGE_MARK, Llava, image_paths
from megatron_mm1.data.records import Control, Document, Reason, Text
from megatron_mm1.data.records import Image as ImagePart
from megatron_mm1.data.tokenizer import open_tokenizer

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Chat(Llava):
    """The layout that `Llava` reads, written as a chat template says, token by token: nothing is put around it.

    Trained is what the template has in its generation blocks. Each `<image>` of a human turn is one of the images, in
    order; elsewhere it is text.

    Args:
        images: the folder of image files; left out: the data set's folder.
        template: a file with a template (Jinja, or a tokenizer_config.json); left out: the one beside the tokenizer,
            else this program's own.
        tokenizer: `mm1 data prepare` gives its own.
    """

    def __init__(
        self, path: Path, *, images: Path | None = None, template: Path | None = None, tokenizer: Path
    ) -> None:
        super().__init__(path, images=images)
        opened = open_tokenizer(tokenizer)
        source, origin = find_template(opened) if template is None else (read_template(template), str(template))
        self._template = ChatTemplate(source, opened, origin=origin)

    def document(self, row: Any, key: str) -> Document:
        messages = [_message(turn) for turn in list_field(row, "conversations")]
        if not any(message["role"] == "assistant" for message in messages):
            raise RejectRecord(Reason.WRONG_FIELDS, "nothing that the assistant says")
        paths = image_paths(mapping(row).get("image"))
        marks = sum(message["content"].count(IMAGE) for message in messages)
        if marks != len(paths):
            raise RejectRecord(Reason.IMAGE_MARKS, f"{marks} marks, {len(paths)} images")
        images = iter([self._folder.read(path) for path in paths])
        parts: list[Text | ImagePart | Control] = []
        try:
            for part in self._template.render(messages):
                parts.append(next(images) if part is IMAGE_SLOT else part)  # type: ignore[arg-type]
        except TemplateError as error:
            raise RejectRecord(Reason.CHAT_TEMPLATE, str(error)) from error
        return Document(tuple(parts), key, complete=True)


def _message(turn: Any) -> dict[str, str]:
    speaker, content = text_field(turn, "from"), text_field(turn, "value")
    if speaker not in _ROLES:
        raise RejectRecord(Reason.WRONG_FIELDS, f"speaker {speaker!a}: expected {', '.join(_ROLES)}")
    if not MARKS.isdisjoint(content):
        raise RejectRecord(Reason.OTHER, "characters for private use that this program needs (U+10FFF0 to U+10FFF3)")
    role = _ROLES[speaker]
    return {"role": role, "content": content.replace(IMAGE_MARK, IMAGE) if role == "user" else content}
