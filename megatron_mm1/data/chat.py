"""Conversations through a chat template (Jinja, as transformers has them), as text, images and control symbols."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_mm1.config.schema import EvaluationConfig
from megatron_mm1.data.records import Control, Text
from megatron_mm1.data.tokenizer import CHAT_SYMBOLS, Tokenizer
from megatron_mm1.data.tokenizer.tokenizer_json import CONFIG, read_json
from megatron_mm1.errors import UserError

IMAGE, _BEGIN, _END, _ORDINARY, _ANSWER = (chr(0x10FFF0 + number) for number in range(5))
"""Characters for private use that stand for something while a template is rendered: an image, the beginning and the end
of what is trained, inside the name of a control symbol, that this is ordinary text, and an answer that is still to be
given."""
MARKS = frozenset((IMAGE, _BEGIN, _END, _ORDINARY, _ANSWER))

OPTIONS = "mm1 data prepare --option template=FILE, --chat-template FILE of other commands, evaluation.chat_template"

OWN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}{{ eos_token }}"
)
"""For tokenizers with this program's chat symbols."""


class TemplateError(Exception):
    """A template cannot render a conversation."""


@dataclass(frozen=True)
class _Slot:
    """The place of the next image."""


IMAGE_SLOT = _Slot()


class _Generation(Extension):
    """`{% generation %} .. {% endgeneration %}` around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class ChatTemplate:
    """A template and the tokenizer whose control symbols it writes.

    Text that users or assistants wrote never becomes a control symbol, whatever it spells. The template may move the
    images that `image_token` stands for in a content, as LLaVA's do.

    Args:
        source: the template; it marks what the assistant says with `{% generation %}`.
        origin: where it comes from, for messages.

    Attributes:
        source, origin: the template, and where it comes from.
        ends: control symbols that it trains behind an answer, any of which ends one; none where it has none there.

    Raises:
        UserError: it is no template, or says nowhere what the assistant says.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, origin: str) -> None:
        self.source, self.origin = source, origin
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        self._variables: dict[str, Any] = {
            f"{role}_token": tokenizer.symbol(token)
            for role, token in {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}.items()
        } | {"image_token": IMAGE, "tools": None, "documents": None}  # the last two as transformers has them
        symbols = sorted(tokenizer.controls, key=len, reverse=True)
        self._symbols = re.compile(f"(?:{'|'.join(map(re.escape, symbols))})(?!{_ORDINARY})")
        try:
            self._template = environment.from_string(source)
            before, after = self._around_answer([{"role": "user", "content": "a"}])
        except (jinja2.TemplateError, TemplateError) as error:
            raise UserError(f"{origin} is no chat template: {error}") from error
        if before.rfind(_BEGIN) <= before.rfind(_END):
            raise UserError(
                f"{origin} does not say what the assistant says, and only that is trained: put {{% generation %}} and "
                f"{{% endgeneration %}} around it in a copy of the template, and name that ({OPTIONS})"
            )
        trained = "".join(stretch.partition(_END)[0] for stretch in after.split(_BEGIN))
        self.ends = tuple(self._symbols.findall(trained))

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[Text | Control | _Slot]:
        """Parts of a conversation; those inside of the template's generation blocks are trained.

        Args:
            messages: {"role", "content"} each; IMAGE in a content is the place of an image.

        Raises:
            TemplateError: the template refuses it, or moves, repeats or leaves out a place of an image.
        """
        return list(self._parts(self._rendered(messages)))

    def ask(self, messages: Sequence[Mapping[str, str]]) -> list[Text | Control | _Slot]:
        """What stands in front of the assistant's next answer, just as `render` has it there.

        It is cut out of the answered conversation: whatever a template makes of `add_generation_prompt`, a model is
        asked as it was trained. Spaces right in front of an answer are the answer's, as its first token has them.

        Raises:
            TemplateError: as `render`.
        """
        before, _ = self._around_answer(messages)
        return list(self._parts(before.rstrip(f" {_BEGIN}")))

    def _around_answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        """What the template writes before and behind an answer to these."""
        answered = self._rendered([*messages, {"role": "assistant", "content": _ANSWER}])
        if answered.count(_ANSWER) != 1:
            raise TemplateError(f"the template writes an answer {answered.count(_ANSWER)} times")
        before, _, after = answered.partition(_ANSWER)
        return before, after

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        protected = [{**message, "content": self._protected(message["content"])} for message in messages]
        text = self._text(protected)
        if (wanted := sum(message["content"].count(IMAGE) for message in messages)) != text.count(IMAGE):
            raise TemplateError(f"the template makes {text.count(IMAGE)} of {wanted} images")
        return text

    def _protected(self, content: str) -> str:
        return self._symbols.sub(lambda symbol: symbol[0][0] + _ORDINARY + symbol[0][1:], content)

    def _text(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=False, **self._variables)
        except Exception as error:  # a template is a program: whatever goes wrong in it is its own
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def _parts(self, text: str) -> Iterator[Text | Control | _Slot]:
        """Controls and images, and runs of text between them with the stretches of them that are trained."""
        run = _Run()
        for piece in re.split(f"({self._symbols.pattern}|[{IMAGE}{_BEGIN}{_END}])", text):
            if piece in (_BEGIN, _END):
                run.trained = piece == _BEGIN
            elif piece == IMAGE or self._symbols.fullmatch(piece):
                yield from run.take()
                yield IMAGE_SLOT if piece == IMAGE else Control(piece, trained=run.trained)
            else:
                run.add(piece.replace(_ORDINARY, ""))
        yield from run.take()


class _Run:
    """Text that is tokenized together."""

    def __init__(self) -> None:
        self.trained = False
        self._text = ""
        self._spans: list[tuple[int, int]] = []

    def add(self, text: str) -> None:
        if text and self.trained:
            self._spans.append((len(self._text), len(self._text) + len(text)))
        self._text += text

    def take(self) -> Iterator[Text]:
        if self._text:
            whole = self._spans == [(0, len(self._text))]
            yield Text(self._text, trained=whole, spans=() if whole else tuple(self._spans))
        self._text, self._spans = "", []


def find_template(tokenizer: Tokenizer) -> tuple[str, str]:
    """(source, origin) of the template that belongs to a tokenizer: chat_template.jinja or `chat_template` of
    tokenizer_config.json beside it, else ours where it has our chat symbols.

    Raises:
        UserError: there is none.
    """
    file = tokenizer.path.with_name("chat_template.jinja")
    if file.is_file():
        return read_template(file), str(file)
    config = tokenizer.path.with_name(CONFIG)
    source = read_json(config).get("chat_template")
    if isinstance(source, str):
        return source, f"chat_template of {config}"
    if set(CHAT_SYMBOLS) <= set(tokenizer.controls):
        return OWN_TEMPLATE, "the template of this program"
    raise UserError(
        f"no chat template: there is no {file.name} beside {tokenizer.path}, no chat_template in {CONFIG}, and the "
        f"tokenizer lacks {', '.join(sorted(set(CHAT_SYMBOLS) - set(tokenizer.controls)))}, which this program's "
        f"template writes: name one ({OPTIONS})"
    )


def read_template(file: Path) -> str:
    """The template in a file: Jinja, or tokenizer_config.json's `chat_template`.

    Raises:
        UserError: there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the chat template {file}: {error}") from error
    if file.suffix != ".json":
        return text
    source = read_json(file).get("chat_template")
    if not isinstance(source, str):
        raise UserError(f"{file} has no chat_template")
    return source


def _to_json(value: Any, **options: Any) -> str:
    """Without HTML's escapes, which Jinja's own filter has."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True)
class Chat:
    """Prompts are what the user of a conversation says.

    Attributes:
        template: a file, as `mm1 data prepare --reader chat` takes it; None: the one that belongs to the tokenizer.
    """

    template: Path | None = None

    @classmethod
    def of(cls, settings: Namespace | EvaluationConfig) -> "Chat | None":
        """From what has `chat` and `chat_template`; None where neither is given."""
        template = settings.chat_template
        if template is None:
            return cls() if settings.chat else None
        return cls(Path(template))

    def open(self, tokenizer: Tokenizer) -> ChatTemplate:
        """Raises UserError: there is no template, or it cannot be used."""
        if self.template is None:
            source, origin = find_template(tokenizer)
        else:
            source, origin = read_template(self.template), str(self.template)
        return ChatTemplate(source, tokenizer, origin=origin)
