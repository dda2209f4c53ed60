"""MM1's processor: text with image placeholders, or conversations, and images -> the model's input."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE, ORDINARY, ANSWER = (chr(0x10FFF0 + number) for number in range(3))
"""Characters for private use that stand for something while a template is rendered: an image, inside the name of a
control symbol, that this is ordinary text, and an answer that is still to be given."""


class MM1Processor(ProcessorMixin):
    """Puts image tokens where the text says `<image>`: `tokens_per_image` for the image, or for each of its tiles.

    The tokenizer takes the names of special tokens in text for ordinary text. Only the placeholder means something, and
    only here; in a conversation, what the template itself writes does.

    Args:
        takes_images: False for a model that was trained on text only.
        tile_indicators: text in front of each tile says where it lies.
        control_symbols: ids of the symbols that a chat template may write, by name.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 144,
        image_token: str = "<image>",
        takes_images: bool = True,
        tile_indicators: bool = False,
        control_symbols: Mapping[str, int] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.takes_images = takes_images
        self.tile_indicators = tile_indicators
        self.control_symbols = dict(control_symbols or {})
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """The input of a batch.

        Args:
            images: all images of the batch in reading order (nested lists are flattened).
            text: one prompt or several; `<image>` stands where an image goes.
            padding: on the tokenizer's padding side, to the longest prompt.

        Returns:
            input_ids and attention_mask [B, S], and pixel_values [images or tiles, 3, H, W] where there are images.

        Raises:
            ValueError: there are not as many placeholders as images, or the model was trained without any.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        spelled = {name for name in self.control_symbols if name != self.image_token for one in prompts if name in one}
        if self.chat_template is not None and spelled:
            warnings.warn(
                f"{', '.join(sorted(spelled))} in a prompt is ordinary text: for conversations use apply_chat_template "
                "with tokenize=True, whose text without it is for reading only",
                stacklevel=2,
            )
        parts = [[self.tokenizer.bos_token_id, *_joined(prompt.split(self.image_token), IMAGE)] for prompt in prompts]
        return self._batch(parts, _flatten(images), padding=padding, return_tensors=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        padding: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The input of a conversation, or of several, as the model was trained on them.

        Args:
            conversation: messages {"role", "content"}; a content is text, or a list of {"type": "text", "text"} and
                {"type": "image", "image" (or "url", "path", "base64")}. No text becomes a control symbol or an image.
            chat_template: instead of the folder's.
            add_generation_prompt: up to where the assistant answers.
            tokenize: False: text to read, with `<image>` for images; a call would take its control symbols for text.
            return_dict: False: input_ids alone.
            padding, return_tensors: as of a call; processor_kwargs may have them too.

        Returns:
            What a call returns.

        Raises:
            ValueError: there is no template, it leaves out images, or a content is of another kind.
        """
        if not conversation:
            raise ValueError("the conversation has no messages")
        if continue_final_message:
            raise ValueError("continue_final_message is not supported: an answer is begun by the template")
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("this folder has no chat template: export with --chat, or give chat_template")
        is_batch = not isinstance(conversation[0], Mapping)
        images: list[Any] = []
        rendered = []
        for messages in conversation if is_batch else [conversation]:
            plain = [{**message, "content": self._content(message["content"], images)} for message in messages]
            rendered.append(self._rendered(plain, template, answer=add_generation_prompt))
        if not tokenize:
            texts = [text.replace(IMAGE, self.image_token).replace(ORDINARY, "") for text in rendered]
            return texts if is_batch else texts[0]
        parts = [list(self._parts(text)) for text in rendered]
        options = {"padding": padding, "return_tensors": return_tensors, **(processor_kwargs or {})}
        batch = self._batch(parts, images, **options)
        return batch if return_dict else batch["input_ids"]

    def _content(self, content: Any, images: list[Any]) -> str:
        """As text whose symbols are ordinary, with IMAGE for images, which are added to `images`."""
        text = ""
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                if not {IMAGE, ORDINARY, ANSWER}.isdisjoint(item["text"]):
                    raise ValueError("a content has characters for private use that stand for something here")
                text += self._symbols.sub(lambda symbol: symbol[0][0] + ORDINARY + symbol[0][1:], item["text"])
            elif item["type"] == "image":
                image = next((item[key] for key in ("image", "url", "path", "base64") if key in item), None)
                if image is None:
                    raise ValueError("an image of a conversation is named there: by image, url, path or base64")
                images.append(load_image(image) if isinstance(image, str) else image)
                text += IMAGE
            else:
                raise ValueError(f"a content of type {item['type']!r}: this model takes text and images")
        return text

    @property
    def _symbols(self) -> re.Pattern[str]:
        names = sorted(self.control_symbols, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _rendered(self, messages: list[dict[str, str]], template: str, *, answer: bool) -> str:
        """A conversation, up to where the assistant's `answer` begins; as in training, its first spaces are its own."""
        tokens = {name: getattr(self.tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
        asked = [*messages, {"role": "assistant", "content": ANSWER}] if answer else messages
        [text], _ = render_jinja_template([asked], chat_template=template, **tokens, image_token=IMAGE)
        places = sum(message["content"].count(IMAGE) for message in messages)
        if text.count(IMAGE) != places or text.count(ANSWER) != answer:
            raise ValueError(f"the template writes {text.count(IMAGE)} of {places} images, or an answer not once")
        return text.partition(ANSWER)[0].rstrip(" ") if answer else text

    def _parts(self, text: str) -> Iterator[int | str]:
        for piece in re.split(f"({self._symbols.pattern}|{IMAGE})", text):
            if piece in self.control_symbols:
                yield self.control_symbols[piece]
            elif piece:
                yield piece if piece == IMAGE else piece.replace(ORDINARY, "")

    def _batch(
        self, prompts: list[list[int | str]], images: list[Any], *, padding: bool, return_tensors: str | None
    ) -> BatchFeature:
        """Prompts as ids, stretches of text, each tokenized by itself, and IMAGE."""
        if images and not self.takes_images:
            raise ValueError("this model was trained on text only and sees no images")
        counts = [prompt.count(IMAGE) for prompt in prompts]
        if sum(counts) != len(images):
            raise ValueError(f"{sum(counts)} placeholders {self.image_token!r} in the text, but {len(images)} images")
        num_images = [count for count in counts for _ in range(count)]
        grids = iter(self.image_processor.grids(images, num_images) if images else ())
        ids = [list(self._ids(prompt, grids)) for prompt in prompts]
        batch = dict(self.tokenizer.pad({"input_ids": ids}, padding=padding, return_attention_mask=True))
        if images:
            batch |= self.image_processor(images, num_images=num_images, return_tensors="pt")
        return BatchFeature(batch, tensor_type=return_tensors)

    def _ids(self, prompt: list[int | str], grids: Iterator[tuple[int, int]]) -> Iterator[int]:
        number = 0
        for part in prompt:
            if isinstance(part, int):
                yield part
            elif part != IMAGE:
                yield from self._encode(part)
            else:
                places = self.image_processor.tiling.places(next(grids)).tolist()
                for row, column in places:
                    if self.tile_indicators and len(places) > 1:
                        yield from self._encode(f"({number},{row + 1},{column + 1})")
                    yield from [self.image_token_id] * self.tokens_per_image
                number += 1

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _joined(texts: list[str], between: str) -> list[str]:
    return [text for part in texts for text in (between, part)][1:]


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, torch.Tensor):
        raise TypeError("images are PIL images or [H, W, 3] uint8 arrays")
    return [images]


__all__ = ["MM1Processor"]
