"""Prompts as positions of the decoder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megatron_mm1.config import MM1Config
from megatron_mm1.data import chat
from megatron_mm1.data.chat import ChatTemplate, TemplateError
from megatron_mm1.data.image_headers import UnusableImage
from megatron_mm1.data.image_headers import image_size as size_of
from megatron_mm1.data.image_tokens import ImageTokens
from megatron_mm1.data.records import Control, Image, Text
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.inference.requests import ImageOfSize, Prompt, WholeImage

IMAGE = "<image>"
"""What stands for an image where a prompt is written as text."""


@dataclass(frozen=True)
class ImageKey:
    """What the features of an image depend on.

    Attributes:
        digest: SHA-256 of the file.
        image_size: px, of each of its tiles.
        grid: (rows, columns) of them.
    """

    digest: bytes
    image_size: int
    grid: tuple[int, int] = (1, 1)


class PromptImage(NamedTuple):
    """An image of a prompt.

    Attributes:
        data: the file's bytes.
        starts: the first position of each of its tiles.
    """

    key: ImageKey
    data: bytes
    starts: tuple[int, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the decoder sees it.

    Attributes:
        tokens: every position's; an image has as many as it takes positions.
        images: in reading order.
    """

    tokens: tuple[int, ...]
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into positions as training does with documents, but for the end of text.

    Attributes:
        image_tokens: lays out images.
        image_size, patch_size: px, of the tower.
        fixed_size: whether the connector takes images of one size only.
        limit: positions that the model was trained with.
        text_only: images are left out, for a model that never saw one.
        template: prompts are what the user of a conversation says, which it writes; None: they are the text itself.
    """

    tokenizer: Tokenizer
    image_tokens: ImageTokens
    image_size: int
    patch_size: int
    fixed_size: bool
    limit: int
    text_only: bool
    template: ChatTemplate | None = None

    @staticmethod
    def of(config: MM1Config, tokenizer: Tokenizer, *, template: ChatTemplate | None = None) -> "PromptEncoder":
        vision, connector = config.model.vision, config.model.connector
        return PromptEncoder(
            tokenizer=tokenizer,
            image_tokens=ImageTokens.of(config, tokenizer),
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            fixed_size=connector.connector == "mlp",  # one token for each patch
            limit=config.data.seq_length,
            text_only=config.data.text_only,
            template=template,
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end what is generated; a text that is scored ends with the first."""
        symbols = () if self.template is None else self.template.ends
        return tuple(dict.fromkeys([*map(self.tokenizer.control_id, symbols), self.tokenizer.eos_id]))

    def __call__(self, prompt: Prompt, *, new_tokens: int) -> EncodedPrompt:
        """Encode a prompt behind which there shall be room for `new_tokens`.

        Raises:
            UserError: there is not, an image has a size that cannot be, the tokenizer lacks a control symbol, or the
                chat template refuses the prompt.
        """
        keys = iter(() if self.text_only else self._keys([part for part in prompt if isinstance(part, Image)]))
        tokens, images = list[int](), list[PromptImage]()
        if self.template is None:
            tokens.append(self.tokenizer.bos_id)
        else:
            prompt = said_by_user(prompt, self.template)
        for part in prompt:
            if isinstance(part, Text):
                tokens += self.tokenizer.encode(part.text)
            elif not isinstance(part, Image):
                tokens.append(self.tokenizer.control_id(part.symbol))
            elif not self.text_only:
                key = next(keys)
                ids = self.image_tokens.ids(len(images), key.grid)
                slots = len(tokens) + np.flatnonzero(ids == self.tokenizer.image_id)
                images.append(PromptImage(key, part.data, tuple(slots[:: self.image_tokens.tokens_per_image].tolist())))
                tokens += ids.tolist()
        if len(tokens) + new_tokens > self.limit:
            of_images = self._of_images(images) if images else ""
            raise UserError(
                f"the prompt's {len(tokens)} positions{of_images} and {new_tokens} more do not fit the {self.limit} "
                "that the model was trained with: shorten it, leave images out, or ask for less"
            )
        return EncodedPrompt(tuple(tokens), tuple(images))

    def _of_images(self, images: Sequence[PromptImage]) -> str:
        tiles = sum(len(image.starts) for image in images)
        cut = f", cut into {tiles} tiles" if self.image_tokens.tiling.kind != "none" else ""
        return f" ({len(images)} images{cut} of {self.image_tokens.tokens_per_image} each)"

    def _keys(self, images: Sequence[Image]) -> list[ImageKey]:
        """Those of all images of a prompt: how many there are decides whether they are tiled."""
        keys = []
        for image in images:
            size = self._size(image)
            tiling = replace(self.image_tokens.tiling, side=size)
            grid = (1, 1)
            if not isinstance(image, WholeImage):
                [grid] = map(tuple, tiling.grids(np.array([_header(image)]), num_images=len(images)).tolist())
            keys.append(ImageKey(hashlib.sha256(image.data).digest(), size, grid))
        return keys

    def _size(self, image: Image) -> int:
        size = image.image_size if isinstance(image, ImageOfSize) else self.image_size
        if size < 1 or size % self.patch_size:
            raise UserError(f"image_size is {size}: give a multiple of the tower's patches of {self.patch_size} px")
        if self.fixed_size and size != self.image_size:
            raise UserError(f"image_size is {size}: this model's connector takes images of {self.image_size} px only")
        return size


def _header(image: Image) -> tuple[int, int]:
    """(height, width), px; any for an image that cannot be decoded, which is noticed then."""
    try:
        return size_of(image.data)
    except UnusableImage:
        return (1, 1)


def prompt_of(text: str, images: Sequence[Image]) -> Prompt:
    """The prompt that `text` writes, with `images` in the places of its "<image>"; before it all where it has none.

    Raises:
        UserError: the numbers differ.
    """
    pieces = text.split(IMAGE)
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) - 1 != len(images):
        raise UserError(
            f"the prompt has {len(pieces) - 1} placeholders {IMAGE} and {len(images)} images: give as many as there "
            "are, or no placeholder at all, and the images come first"
        )
    parts: list[Text | Image] = []
    for number, piece in enumerate(pieces):
        parts += [Text(piece)] if piece else []
        parts += images[number : number + 1]
    return parts


def said_by_user(prompt: Prompt, template: ChatTemplate) -> Prompt:
    """A conversation in which the user says `prompt`, up to where the assistant answers.

    Raises:
        UserError: the template refuses it, or the prompt holds what only templates write.
    """
    images = [part for part in prompt if isinstance(part, Image)]
    for part in prompt:
        if isinstance(part, Control) or (isinstance(part, Text) and not chat.MARKS.isdisjoint(part.text)):
            raise UserError(f"in a conversation a prompt is text and images, and {part!a} is not: leave it out")
    content = "".join(part.text if isinstance(part, Text) else chat.IMAGE for part in prompt)
    try:
        parts = template.ask([{"role": "user", "content": content}])
    except TemplateError as error:
        raise UserError(f"the chat template refuses the prompt: {error}") from error
    shown = iter(images)
    return [next(shown) if part is chat.IMAGE_SLOT else part for part in parts]  # type: ignore[misc]
