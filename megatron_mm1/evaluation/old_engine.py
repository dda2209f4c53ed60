"""The engine without requests, behind the interface with requests."""

from collections.abc import Sequence

from megatron_mm1.data.images import UnusableImage, check_image
from megatron_mm1.data.records import Image, Text
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.requests import Failure, Generation, GenerationRequest, Prompt, Score, ScoringRequest


class OldEngine:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        failures = [self._failure(one.prompt, one.max_new_tokens) for one in requests]
        fine = [one for one, failure in zip(requests, failures, strict=True) if failure is None]
        longest = max((one.max_new_tokens for one in fine), default=0)
        texts = iter(self.engine.generate([_plain(one.prompt) for one in fine], max_new_tokens=longest))
        return [failure or _cut(next(texts), one.stop) for one, failure in zip(requests, failures, strict=True)]

    def score(self, requests: Sequence[ScoringRequest]) -> list[Score | Failure]:
        failures = [
            self._failure(one.prompt, len(self.engine.tokenizer.encode(one.continuation)) + 1) for one in requests
        ]
        fine = [one for one, failure in zip(requests, failures, strict=True) if failure is None]
        scores = iter(self.engine.score([_plain(one.prompt) for one in fine], [one.continuation for one in fine]))
        answers: list[Score | Failure] = []
        for failure in failures:
            if failure is not None:
                answers.append(failure)
            else:
                score = next(scores)
                answers.append(Score((score.log_likelihood / score.num_tokens,) * score.num_tokens))
        return answers

    def _failure(self, prompt: Prompt, new_tokens: int) -> Failure | None:
        engine = self.engine
        images = [part for part in prompt if isinstance(part, Image)]
        length, limit = engine._length(engine._piece(_plain(prompt))) + new_tokens, engine.config.data.seq_length
        if len(images) > engine.config.data.max_images_per_sequence:
            return Failure(f"{len(images)} images are more than {engine.config.data.max_images_per_sequence}")
        if length > limit:
            return Failure(f"{length} positions are more than {limit}")
        for image in images:
            try:
                check_image(image.data)
            except UnusableImage as error:
                return Failure(f"an image is unusable: {error.kind}")
        return None


def _plain(prompt: Prompt) -> list[Text | Image]:
    return [part for part in prompt if isinstance(part, Text | Image)]


def _cut(text: str, stop: Sequence[str]) -> Generation:
    ends = [place for string in stop if (place := text.find(string)) >= 0]
    return Generation(text[: min(ends, default=None)], (), "stop" if ends else "length")
