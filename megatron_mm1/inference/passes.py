"""Prompts, and what follows them, as passes through the decoder."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_mm1.inference.prompts import EncodedPrompt, ImageKey
from megatron_mm1.model.cached_attention import KeyValueCache, Stretch, StretchAttention
from megatron_mm1.model.decoding import Pass, make_pass
from megatron_mm1.model.mm1 import MM1Model


def prompt_pass(
    model: MM1Model,
    prompts: Sequence[EncodedPrompt],
    features: Mapping[ImageKey, Tensor | None],
    *,
    cache: KeyValueCache,
    row: int,
) -> tuple[Pass, Tensor | None]:
    """A pass over whole prompts that wants the logits behind each.

    Args:
        features: image tokens by image, on the first stage; None on others.
        cache: its rows from `row` on take the prompts' keys and values.

    Returns:
        The pass, and the image tokens [tiles, tokens_per_image, H] that go with it.
    """
    builder = PassBuilder()
    for number, prompt in enumerate(prompts):
        stop = builder.add_prompt(prompt, row=row + number)
        builder.wanted.append(stop - 1)
    return builder.build(model, features, cache=cache)


class PassBuilder:
    """Puts stretches of sequences one behind the other.

    Attributes:
        wanted: the positions whose logits are wanted.
    """

    def __init__(self) -> None:
        self.wanted: list[int] = []
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._stretches: list[Stretch] = []
        self._images: list[ImageKey] = []
        self._starts: list[int] = []  # of their tiles

    def __len__(self) -> int:
        return len(self._tokens)

    def add_prompt(self, prompt: EncodedPrompt, *, row: int | None = None) -> int:
        """Add a prompt, to be kept in a row of the cache; returns where it stops."""
        self._images += [image.key for image in prompt.images]
        self._starts += [len(self) + start for image in prompt.images for start in image.starts]
        return self._add(prompt.tokens, Stretch(len(self), len(self) + len(prompt.tokens), row=row))

    def add_behind_prompt(self, tokens: Sequence[int]) -> int:
        """Add text that continues the prompt added last, as other text may; returns where it stops."""
        behind = max(number for number, stretch in enumerate(self._stretches) if stretch.behind is None)
        return self._add(tokens, Stretch(len(self), len(self) + len(tokens), behind=behind))

    def _add(self, tokens: Sequence[int], stretch: Stretch) -> int:
        first = 0
        if stretch.behind is not None:
            before = self._stretches[stretch.behind]
            first = before.stop - before.start
        self._tokens += tokens
        self._positions += range(first, first + len(tokens))
        self._stretches.append(stretch)
        return stretch.stop

    def build(
        self, model: MM1Model, features: Mapping[ImageKey, Tensor | None], *, cache: KeyValueCache | None = None
    ) -> tuple[Pass, Tensor | None]:
        """The pass, and its image tokens on the first stage."""
        each = model.tokens_per_image if model.pre_process else 0
        run = make_pass(
            model,
            self._tokens,
            self._positions,
            StretchAttention(stretches=self._stretches, cache=cache),
            wanted=self.wanted,
            slots=[range(start, start + each) for start in self._starts] if model.pre_process else (),
        )
        if run.slots is None:
            return run, None
        image_tokens = [features[key] for key in self._images]
        return run, torch.cat([tokens for tokens in image_tokens if tokens is not None]).to(run.tokens.device)
