"""How likely given text is behind a prompt; a prompt that several texts continue is read once for all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_mm1.inference.features import ImageFeatures
from megatron_mm1.inference.passes import PassBuilder
from megatron_mm1.inference.prompts import EncodedPrompt
from megatron_mm1.inference.replica import Replica
from megatron_mm1.inference.sampling import VocabularyPart, log_probabilities

_MOST_WANTED = 2048
"""Positions of a pass whose logits are wanted: they take as much memory as the vocabulary is large."""


@dataclass(frozen=True)
class Target:
    """Text behind a prompt.

    Attributes:
        index: of the request.
        token_ids: one or more.
    """

    index: int
    prompt: EncodedPrompt
    token_ids: tuple[int, ...]


class Scorer:
    """Runs targets together.

    Args:
        part: this rank's part of the vocabulary.
        max_positions: of one pass; a target that is longer has one to itself.
    """

    def __init__(self, replica: Replica, features: ImageFeatures, part: VocabularyPart, *, max_positions: int) -> None:
        self._replica, self._features, self._part = replica, features, part
        self._max_positions = max_positions

    def run(self, targets: Sequence[Target]) -> Iterator[tuple[Target, tuple[float, ...] | None]]:
        """Log-probabilities of each target's tokens; None where an image of its prompt cannot be decoded."""
        for together in self._passes(targets):
            features = self._features.of([target.prompt for target in together])
            usable = [target for target in together if all(key in features for key, _, _ in target.prompt.images)]
            yield from ((target, None) for target in together if target not in usable)
            if not usable:
                continue
            builder, token_ids = _build(usable)
            run, image_tokens = builder.build(self._replica.first, features)
            logits = self._replica.logits(run, image_tokens)
            tokens = torch.tensor(token_ids, device=run.tokens.device)
            if logits is None:
                values = torch.empty(len(tokens), dtype=torch.float64, device=tokens.device)
            else:
                values = log_probabilities(logits, tokens, part=self._part)
            found = iter(self._replica.agree(values).tolist())
            for target in usable:
                yield target, tuple(next(found) for _ in target.token_ids)

    def _passes(self, targets: Sequence[Target]) -> Iterator[list[Target]]:
        """Targets of one pass, those with the same prompt one behind the other."""
        ordered = sorted(targets, key=lambda target: (len(target.prompt.tokens), _identity(target.prompt)))
        together: list[Target] = []
        positions = wanted = 0
        for target in ordered:
            is_same = bool(together) and _identity(together[-1].prompt) == _identity(target.prompt)
            positions += len(target.token_ids) + (0 if is_same else len(target.prompt.tokens))
            wanted += len(target.token_ids)
            if together and (positions > self._max_positions or wanted > _MOST_WANTED):
                yield together
                together, wanted = [], len(target.token_ids)
                positions = len(target.prompt.tokens) + len(target.token_ids)
            together.append(target)
        if together:
            yield together


def _identity(prompt: EncodedPrompt) -> tuple[tuple[int, ...], tuple[tuple[bytes, int, tuple[int, int]], ...]]:
    """Equal for equal prompts, and of some order."""
    return prompt.tokens, tuple((key.digest, key.image_size, key.grid) for key, _, _ in prompt.images)


def _build(targets: Sequence[Target]) -> tuple[PassBuilder, list[int]]:
    """A pass over targets, and the tokens whose probabilities its wanted positions give."""
    builder = PassBuilder()
    token_ids: list[int] = []
    prompt, behind = None, 0
    for target in targets:
        if prompt is None or _identity(prompt) != _identity(target.prompt):
            prompt, behind = target.prompt, builder.add_prompt(target.prompt)
        builder.wanted.append(behind - 1)
        if inputs := target.token_ids[:-1]:
            stop = builder.add_behind_prompt(inputs)
            builder.wanted += range(stop - len(inputs), stop)
        token_ids += target.token_ids
    return builder, token_ids
