"""Answers to requests, from a model in any parallel layout: generated text, and the likelihood of given text."""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import fp8_recipes, padded_vocab_size
from megatron_mm1.data.chat import ChatTemplate
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.inference.features import ImageFeatures
from megatron_mm1.inference.generation import Continuation, Generator, TextCallback
from megatron_mm1.inference.prompts import EncodedPrompt, PromptEncoder
from megatron_mm1.inference.replica import Replica
from megatron_mm1.inference.requests import Failure, Generation, GenerationRequest, Score, ScoringRequest
from megatron_mm1.inference.sampling import VocabularyPart
from megatron_mm1.inference.scoring import Scorer, Target
from megatron_mm1.parallel.device import device


class Engine:
    """Answers lists of requests. All ranks of a replica call it with the same ones and get the same answers.

    Weights are used where they are: a model that is being trained can be asked between two steps and is afterwards as
    it was. An engine keeps what it made of images, so make a new one when the weights have changed.

    Args:
        config: of the model, in the layout of `pg_collection`.
        model: this rank's stage with its weights, or its virtual stages in order, whatever wraps them.
        pg_collection: the process groups of this layout.
        batch_size: continuations that are generated together.
        max_positions: of prompts that go through the model in one pass.
        image_cache_bytes: of host memory for image tokens, from which the image used longest ago goes first.
        images_together: see `ImageFeatures`; for answers that are the same to the last digit whatever was asked before.
        chat: every prompt is put to the model as what the user of a conversation says, and an answer ends where the
            assistant's turn does; None: prompts are continued as they are.

    Raises:
        UserError: the model cannot be run on prompts.
    """

    def __init__(
        self,
        config: MM1Config,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        tokenizer: Tokenizer,
        *,
        pg_collection: ProcessGroupCollection,
        batch_size: int = 64,
        max_positions: int = 8192,
        image_cache_bytes: int = 4 * 2**30,
        images_together: int | None = None,
        chat: ChatTemplate | None = None,
    ) -> None:
        check_askable(config)
        self.config, self.tokenizer, self.pg_collection, self.chat = config, tokenizer, pg_collection, chat
        self.replica = Replica([model] if isinstance(model, torch.nn.Module) else model, pg_collection)
        self.features = ImageFeatures(config, self.replica, capacity_bytes=image_cache_bytes, together=images_together)
        self._encode = PromptEncoder.of(config, tokenizer, template=chat)
        part = _vocabulary_part(config, tokenizer, pg_collection, ends=self._encode.ends)
        self._generator = Generator(
            self.replica, self.features, part, batch_size=batch_size, max_positions=max_positions
        )
        self._scorer = Scorer(self.replica, self.features, part, max_positions=max_positions)

    def generate(
        self, requests: Sequence[GenerationRequest], *, on_text: TextCallback | None = None
    ) -> list[Generation | Failure]:
        """Continue prompts; the beginning of text, padding and images are never generated.

        Args:
            on_text: called on every rank with the index of a request and each piece of its text that is certain.

        Returns:
            An answer for each request, in their order.
        """
        answers: dict[int, Generation | Failure] = {}
        continuations = []
        for index, request in enumerate(requests):
            try:
                prompt = self._encode(request.prompt, new_tokens=request.max_new_tokens)
            except UserError as error:
                answers[index] = Failure(str(error))
                continue
            continuations.append(
                Continuation(index, request, prompt, tokenizer=self.tokenizer, ends=self._encode.ends, on_text=on_text)
            )
        with self.replica.answering():
            for one in self._generator.run(continuations):
                answers[one.index] = self._undecodable(one.prompt) if one.finish_reason is None else one.result()
        return [answers[index] for index in range(len(requests))]

    def score(self, requests: Sequence[ScoringRequest]) -> list[Score | Failure]:
        """How likely each continuation is behind its prompt, in the order of the requests."""
        answers: dict[int, Score | Failure] = {}
        targets = []
        for index, request in enumerate(requests):
            ids = self.tokenizer.encode(request.continuation) + [self._encode.ends[0]] * request.with_end
            try:
                if not ids:
                    raise UserError("the continuation is empty, and its end is not to be counted: nothing to score")
                targets.append(Target(index, self._encode(request.prompt, new_tokens=len(ids)), tuple(ids)))
            except UserError as error:
                answers[index] = Failure(str(error))
        with self.replica.answering():
            for target, values in self._scorer.run(targets):
                answers[target.index] = self._undecodable(target.prompt) if values is None else Score(values)
        return [answers[index] for index in range(len(requests))]

    def _undecodable(self, prompt: EncodedPrompt) -> Failure:
        numbers = [number for number, (key, _, _) in enumerate(prompt.images, 1) if self.features.is_unusable(key)]
        return Failure(f"image {numbers[0]} of the prompt cannot be decoded")


def check_askable(config: MM1Config) -> None:
    """Raises UserError if a model of this configuration cannot be run on prompts, whatever its weights."""
    scaled_by_history = [part for part, recipe in fp8_recipes(config.fp8).items() if recipe == "fp8_delayed"]
    if scaled_by_history:
        raise UserError(
            f"the {' and the '.join(scaled_by_history)}: multiplied by fp8_delayed, whose scales remember what goes "
            "through them, so that asking the model would change its training: ask a checkpoint, or use another recipe"
        )


def _vocabulary_part(
    config: MM1Config, tokenizer: Tokenizer, groups: ProcessGroupCollection, *, ends: Sequence[int]
) -> VocabularyPart:
    size = padded_vocab_size(config.model.decoder.vocab_size, groups.tp.size()) // groups.tp.size()
    tokens = torch.arange(size) + groups.tp.rank() * size
    never = {tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id} - {*ends}  # one id may pad and end texts
    allowed = (tokens < tokenizer.vocab_size) & ~torch.isin(tokens, torch.tensor(sorted(never)))
    return VocabularyPart(groups.tp, groups.tp.rank() * size, allowed.to(device()))
