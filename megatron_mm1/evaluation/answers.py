"""Requests of an evaluation given to an engine, and what comes back as outcomes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from megatron_mm1.data.records import Image, Text
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.fewshot import FewShot, Request
from megatron_mm1.evaluation.items import ImageFile, Prompt
from megatron_mm1.evaluation.task import Outcome, Refusal, Task
from megatron_mm1.inference.requests import (
    Failure,
    Generation,
    GenerationRequest,
    ImageOfSize,
    Score,
    ScoringRequest,
    WholeImage,
)


class Responder(Protocol):
    """What answers: `inference.engine.Engine`. One that several ranks make up takes the same requests on each."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]: ...

    def score(self, requests: Sequence[ScoringRequest]) -> list[Score | Failure]: ...


def outcomes_of(
    responder: Responder, requests: Sequence[Request], task: Task, settings: FewShot
) -> list[Outcome | Refusal]:
    """What the responder makes of each request; one that it cannot answer does not affect the others."""
    read = cache(ImageFile.read)  # of one call, so that memory holds the images of one call
    loaded = [_load(one, read) for one in requests]
    usable = [(one, images) for one, images in zip(requests, loaded, strict=True) if not isinstance(images, Refusal)]
    answered = iter(_answered(responder, usable, task, settings))
    return [one if isinstance(one, Refusal) else next(answered) for one in loaded]


_Images = dict[ImageFile, Image]
_Loaded = tuple[Request, _Images]


def _load(request: Request, read: Callable[[ImageFile], Image]) -> _Images | Refusal:
    """The images of all prompts of a request."""
    prompts = (request.prompt, *(prompt for prompt, _ in request.scored))
    try:
        return {part: read(part) for prompt in prompts for part in prompt if isinstance(part, ImageFile)}
    except UserError as error:
        return Refusal(str(error))


def _answered(
    responder: Responder, usable: Sequence[_Loaded], task: Task, settings: FewShot
) -> list[Outcome | Refusal]:
    stopping = settings.stopping(task)
    generations: list[Generation | Failure | None] = [None] * len(usable)
    if stopping.max_new_tokens:
        generations[:] = responder.generate(
            [
                GenerationRequest(
                    prompt=_shown(one.prompt, images, settings),
                    max_new_tokens=stopping.max_new_tokens,
                    stop=stopping.strings,
                )
                for one, images in usable
            ]
        )
    scores = iter(
        responder.score(
            [
                ScoringRequest(prompt=_shown(prompt, images, settings), continuation=text)
                for one, images in usable
                for prompt, text in one.scored
            ]
        )
    )
    return [
        _outcome(generation, [next(scores) for _ in one.scored], settings)
        for (one, _), generation in zip(usable, generations, strict=True)
    ]


def _shown(prompt: Prompt, images: _Images, settings: FewShot) -> list[Text | Image]:
    return [_sized(images[part], part, settings) if isinstance(part, ImageFile) else part for part in prompt]


def _sized(image: Image, file: ImageFile, settings: FewShot) -> Image:
    if not file.high_resolution:
        return WholeImage(image.data)
    return image if settings.high_resolution is None else ImageOfSize(image.data, image_size=settings.high_resolution)


def _outcome(
    generation: Generation | Failure | None, scores: Sequence[Score | Failure], settings: FewShot
) -> Outcome | Refusal:
    for answer in (generation, *scores):
        if isinstance(answer, Failure):
            return Refusal(answer.message)
    known = tuple(score for score in scores if isinstance(score, Score))
    if not isinstance(generation, Generation):
        return Outcome(text="", scores=known)
    return Outcome(settings.answer(generation.text), known, generation.text, generation.finish_reason)
