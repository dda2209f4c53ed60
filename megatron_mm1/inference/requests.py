"""What is asked of a model, and what it answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_mm1.data.records import Control, Image, Text
from megatron_mm1.errors import UserError

Prompt = Sequence[Text | Image | Control]
"""Text, images and control symbols in reading order, tokenized part by part as training data is; the beginning of text
goes before it by itself."""


@dataclass(frozen=True)
class ImageOfSize(Image):
    """An image for the tower to see at another size than the one it was trained with: it takes as many positions.

    Attributes:
        image_size: side of the square, px, a multiple of the tower's patches.
    """

    image_size: int = field(kw_only=True)


@dataclass(frozen=True)
class WholeImage(Image):
    """An image that is not cut into tiles, by a model that cuts them: one in low resolution."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from the model's distribution.

    Attributes:
        temperature: logits are divided by it; 0: the likeliest token is taken, of equals the one with the lowest id.
        top_k: only so many likeliest tokens, and those as likely as the last of them; None: all.
        top_p: only the likeliest tokens that together have this probability, after `top_k`.
        seed: of this request's random numbers, which do not depend on what else is asked or on the parallel layout.

    Raises:
        UserError: a value means nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature:g}: give 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: give 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p:g}: give more than 0, and 1 at most")


GREEDY = Sampling()

FinishReason = Literal["end", "stop", "length"]
"""The model ended the text, a stop string came, or as many tokens as were asked for are there."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt to be continued.

    Attributes:
        max_new_tokens: at most so many tokens.
        stop: the text ends before the first of these strings, which may begin and end within tokens.

    Raises:
        UserError: no tokens are asked for, or a stop string is empty.
    """

    prompt: Prompt
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if "" in self.stop:
            raise UserError("a stop string is empty: leave it out")


@dataclass(frozen=True)
class Generation:
    """The continuation of a prompt.

    Attributes:
        text: without the stop string.
        token_ids: as chosen, without the end of text; where a stop string ended the text, up to the token that
            completed it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """A continuation whose likelihood behind a prompt is wanted.

    Attributes:
        with_end: count the end of the text after it too.
    """

    prompt: Prompt
    continuation: str
    with_end: bool = True


@dataclass(frozen=True)
class Score:
    """Likelihood of a continuation.

    Attributes:
        token_log_likelihoods: of each of its tokens given all before it, nats.
    """

    token_log_likelihoods: tuple[float, ...]

    @property
    def log_likelihood(self) -> float:
        """Of the whole continuation, nats."""
        return math.fsum(self.token_log_likelihoods)

    @property
    def num_tokens(self) -> int:
        return len(self.token_log_likelihoods)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.log_likelihood / self.num_tokens


@dataclass(frozen=True)
class Failure:
    """Stands in the place of the answer to a request that cannot be answered; others are not affected.

    Attributes:
        message: what is wrong and what to do, in one line.
    """

    message: str
