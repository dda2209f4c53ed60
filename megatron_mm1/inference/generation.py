"""Prompts continued token by token: each takes a row of a key/value cache and leaves it to the next when it is done."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.inference.features import ImageFeatures
from megatron_mm1.inference.output import OutputText
from megatron_mm1.inference.passes import prompt_pass
from megatron_mm1.inference.prompts import EncodedPrompt, ImageKey
from megatron_mm1.inference.replica import Replica
from megatron_mm1.inference.requests import FinishReason, Generation, GenerationRequest
from megatron_mm1.inference.sampling import VocabularyPart, choose_tokens
from megatron_mm1.model.cached_attention import DecodeAttention, KeyValueCache
from megatron_mm1.model.decoding import make_pass

TextCallback = Callable[[int, str], None]
"""Called with the number of a request and a piece of its text, as soon as no stop string can take it back."""


class Continuation:
    """A prompt and what has been made of it so far.

    Args:
        index: of the request among those asked together.
        ends: tokens that end the text.
        on_text: called with pieces of the text; None: nobody follows.

    Attributes:
        token_ids: chosen so far, without the one that ended the text.
        finish_reason: None while it goes on.
    """

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        prompt: EncodedPrompt,
        *,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        on_text: TextCallback | None,
    ) -> None:
        self.index, self.request, self.prompt = index, request, prompt
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._ends, self._on_text = tokenizer, ends, on_text
        self._random = random.Random(request.sampling.seed)
        followed = on_text is not None or request.stop
        self._output = OutputText(tokenizer.decode, request.stop) if followed else None

    @property
    def capacity(self) -> int:
        """Positions it may come to have."""
        return len(self.prompt.tokens) + self.request.max_new_tokens

    @property
    def num_cached(self) -> int:
        """Its positions in the cache: all but that of the newest token."""
        return len(self.prompt.tokens) + len(self.token_ids) - 1

    def random_number(self) -> float:
        """The next in 0 <= u < 1: one for each token, whoever else runs."""
        return self._random.random()

    def add(self, token: int) -> None:
        """The token chosen next."""
        if token in self._ends:
            self.finish_reason = "end"
        else:
            self.token_ids.append(token)
            if len(self.token_ids) == self.request.max_new_tokens:
                self.finish_reason = "length"
        if self._output is not None:
            self._follow(self._output)

    def _follow(self, output: OutputText) -> None:
        if self.finish_reason != "end":
            output.add(self.token_ids[-1])
        if self.finish_reason is not None:
            output.end()
        if output.stopped:
            self.finish_reason = "stop"
        if self._on_text is not None:
            text = output.new_text(is_final=self.finish_reason is not None)
            if text:
                self._on_text(self.index, text)

    def result(self) -> Generation:
        """The answer, once it is finished."""
        assert self.finish_reason is not None
        text = self._tokenizer.decode(self.token_ids) if self._output is None else self._output.text
        return Generation(text, tuple(self.token_ids), self.finish_reason)


class Generator:
    """Runs continuations together.

    Args:
        part: this rank's part of the vocabulary, and what may be generated.
        batch_size: continuations that go on together.
        max_positions: of prompts that are read in one pass; one that is longer is read alone.
    """

    def __init__(
        self,
        replica: Replica,
        features: ImageFeatures,
        part: VocabularyPart,
        *,
        batch_size: int,
        max_positions: int,
    ) -> None:
        self._replica, self._features, self._part = replica, features, part
        self._batch_size, self._max_positions = batch_size, max_positions

    def run(self, continuations: Sequence[Continuation]) -> Iterator[Continuation]:
        """Each as soon as it is finished; without a finish reason where an image of its prompt cannot be decoded."""
        # The long ones first: those that run together are alike, and memory is short at once or not at all.
        waiting = deque(sorted(continuations, key=lambda one: -one.capacity))
        if not waiting:
            return
        cache = KeyValueCache(rows=min(self._batch_size, len(waiting)), capacity=waiting[0].capacity)
        running: list[Continuation] = []
        while waiting or running:
            admitted = self._next_in_line(waiting, rows=cache.rows - len(running))
            features = self._features.of([one.prompt for one in admitted])
            usable = [one for one in admitted if all(key in features for key, _, _ in one.prompt.images)]
            yield from (one for one in admitted if one not in usable)
            if usable:
                logits = self._read(usable, features, cache, row=len(running))
                self._choose(usable, logits)
                running += usable
            elif running:
                self._choose(running, self._step(running, cache))
            yield from _retire(running, cache)

    def _next_in_line(self, waiting: deque[Continuation], *, rows: int) -> list[Continuation]:
        """As many as there are rows and one pass holds."""
        admitted: list[Continuation] = []
        positions = 0
        while waiting and len(admitted) < rows:
            positions += len(waiting[0].prompt.tokens)
            if admitted and positions > self._max_positions:
                break
            admitted.append(waiting.popleft())
        return admitted

    def _read(
        self,
        continuations: Sequence[Continuation],
        features: Mapping[ImageKey, Tensor | None],
        cache: KeyValueCache,
        *,
        row: int,
    ) -> Tensor | None:
        """Logits behind prompts, whose keys and values go to the cache's rows from `row` on."""
        run, image_tokens = prompt_pass(
            self._replica.first, [one.prompt for one in continuations], features, cache=cache, row=row
        )
        return self._replica.logits(run, image_tokens)

    def _step(self, running: Sequence[Continuation], cache: KeyValueCache) -> Tensor | None:
        """Logits behind the newest tokens of all rows in use."""
        lengths = [one.num_cached for one in running]
        attention = DecodeAttention(cache=cache, lengths=lengths)
        run = make_pass(
            self._replica.first,
            [one.token_ids[-1] for one in running],
            lengths,
            attention,
            wanted=range(len(running)),
        )
        return self._replica.logits(run)

    def _choose(self, continuations: Sequence[Continuation], logits: Tensor | None) -> None:
        uniforms = [one.random_number() for one in continuations]
        if logits is None:
            tokens = torch.empty(len(continuations), dtype=torch.int64, device=self._part.allowed.device)
        else:
            samplings = [one.request.sampling for one in continuations]
            tokens = choose_tokens(logits, samplings, uniforms, part=self._part)
        for one, token in zip(continuations, self._replica.agree(tokens).tolist(), strict=True):
            one.add(token)


def _retire(running: list[Continuation], cache: KeyValueCache) -> Iterator[Continuation]:
    """Take out what is finished; the last row in use moves to each row that becomes free."""
    for row in reversed(range(len(running))):
        one = running[row]
        if one.finish_reason is None:
            continue
        last = running.pop()
        if last is not one:
            cache.move(len(running), row, length=last.num_cached)
            running[row] = last
        yield one
