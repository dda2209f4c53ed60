"""MM1's processor: text with image placeholders and images -> the model's input."""

from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class MM1Processor(ProcessorMixin):
    """Puts `tokens_per_image` image tokens where the text says `<image>`.

    The tokenizer takes the names of special tokens in text for ordinary text; only the placeholder means something, and
    only here.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 144,
        image_token: str = "<image>",
        takes_images: bool = True,
        chat_template: str | None = None,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.takes_images = takes_images
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
            input_ids and attention_mask [B, S], and pixel_values [images, 3, H, W] where there are images.

        Raises:
            ValueError: there are not as many placeholders as images, or the model was trained without any.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        flat = _flatten(images)
        if flat and not self.takes_images:
            raise ValueError("this model was trained on text only and sees no images")
        places = sum(prompt.count(self.image_token) for prompt in prompts)
        if places != len(flat):
            raise ValueError(f"{places} placeholders {self.image_token!r} in the text, but {len(flat)} images")
        ids = [self._encode(prompt) for prompt in prompts]
        batch = dict(self.tokenizer.pad({"input_ids": ids}, padding=padding, return_attention_mask=True))
        if flat:
            batch |= self.image_processor(flat, return_tensors="pt")
        return BatchFeature(batch, tensor_type=return_tensors)

    def _encode(self, prompt: str) -> list[int]:
        """Beginning of text, then each stretch of text tokenized by itself, with image tokens between."""
        ids = [self.tokenizer.bos_token_id]
        for index, part in enumerate(prompt.split(self.image_token)):
            if index:
                ids += [self.image_token_id] * self.tokens_per_image
            ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, torch.Tensor):
        raise TypeError("images are PIL images or [H, W, 3] uint8 arrays")
    return [images]


__all__ = ["MM1Processor"]
