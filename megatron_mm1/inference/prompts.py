"""Prompts as positions of the decoder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm1.config import MM1Config
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.inference.requests import ImageOfSize, Prompt

IMAGE = "<image>"
"""What stands for an image where a prompt is written as text."""


@dataclass(frozen=True)
class ImageKey:
    """What the features of an image depend on.

    Attributes:
        digest: SHA-256 of the file.
        image_size: px.
    """

    digest: bytes
    image_size: int


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the decoder sees it.

    Attributes:
        tokens: every position's; an image has as many as it takes positions.
        images: in reading order: key, the file's bytes, and the image's first position.
    """

    tokens: tuple[int, ...]
    images: tuple[tuple[ImageKey, bytes, int], ...] = ()


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into positions as training does with documents, but for the end of text.

    Attributes:
        image_size, patch_size: px, of the tower.
        fixed_size: whether the connector takes images of one size only.
        limit: positions that the model was trained with.
        text_only: images are left out, for a model that never saw one.
    """

    tokenizer: Tokenizer
    tokens_per_image: int
    image_size: int
    patch_size: int
    fixed_size: bool
    limit: int
    text_only: bool

    @staticmethod
    def of(config: MM1Config, tokenizer: Tokenizer) -> "PromptEncoder":
        vision, connector = config.model.vision, config.model.connector
        return PromptEncoder(
            tokenizer=tokenizer,
            tokens_per_image=connector.tokens_per_image,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            fixed_size=connector.connector == "mlp",  # one token for each patch
            limit=config.data.seq_length,
            text_only=config.data.text_only,
        )

    def __call__(self, prompt: Prompt, *, new_tokens: int) -> EncodedPrompt:
        """Encode a prompt behind which there shall be room for `new_tokens`.

        Raises:
            UserError: there is not, an image has a size that cannot be, or the tokenizer lacks a control symbol.
        """
        tokens, images = [self.tokenizer.bos_id], []
        for part in prompt:
            if isinstance(part, Text):
                tokens += self.tokenizer.encode(part.text)
            elif not isinstance(part, Image):
                tokens.append(self.tokenizer.control_id(part.symbol))
            elif not self.text_only:
                images.append((self._key(part), part.data, len(tokens)))
                tokens += [self.tokenizer.image_id] * self.tokens_per_image
        if len(tokens) + new_tokens > self.limit:
            of_images = f" ({len(images)} images of {self.tokens_per_image} each)" if images else ""
            raise UserError(
                f"the prompt's {len(tokens)} positions{of_images} and {new_tokens} more do not fit the {self.limit} "
                "that the model was trained with: shorten it, leave images out, or ask for less"
            )
        return EncodedPrompt(tuple(tokens), tuple(images))

    def _key(self, image: Image) -> ImageKey:
        size = image.image_size if isinstance(image, ImageOfSize) else self.image_size
        if size < 1 or size % self.patch_size:
            raise UserError(f"image_size is {size}: give a multiple of the tower's patches of {self.patch_size} px")
        if self.fixed_size and size != self.image_size:
            raise UserError(f"image_size is {size}: this model's connector takes images of {self.image_size} px only")
        return ImageKey(hashlib.sha256(image.data).digest(), size)


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
