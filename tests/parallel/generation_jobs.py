"""What the workers of test_generate run: the engine, and the same computed the slow way."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_mm1.config import MM1Config
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.records import Control, Image, Text
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.replica import Replica
from megatron_mm1.inference.requests import (
    GREEDY,
    Failure,
    Generation,
    GenerationRequest,
    Prompt,
    Sampling,
    Score,
    ScoringRequest,
)
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training.build import build_module
from megatron_mm1.training.checkpointing import load_weights
from tests.parallel import jobs


def run_engine(
    config: MM1Config,
    checkpoint: Path,
    prompts: list[Prompt],
    continuations: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    special_ids: dict[str, int] | None = None,
    samplings: list[Sampling] | None = None,
) -> tuple[list[list[int] | Failure], list[Score | Failure]]:
    """Generated ids and scores; `special_ids` replaces ids of the tokenizer, without `samplings` choices are greedy."""
    groups = build_process_groups(config.parallel, seed=1)
    try:
        model = build_module(config, backend="local", pg_collection=groups)
        load_weights(checkpoint, [model], pg_collection=groups)
        tokenizer = open_tokenizer(config.data.tokenizer)
        vars(tokenizer).update(special_ids or {})
        engine = Engine(config, model, tokenizer, pg_collection=groups, batch_size=batch_size)
        how = zip(prompts, samplings or [GREEDY] * len(prompts), strict=True)
        answers = engine.generate(
            [GenerationRequest(prompt=prompt, max_new_tokens=max_new_tokens, sampling=one) for prompt, one in how]
        )
        pairs = zip(prompts, continuations, strict=True)
        scores = engine.score([ScoringRequest(prompt=prompt, continuation=text) for prompt, text in pairs])
        return [list(one.token_ids) if isinstance(one, Generation) else one for one in answers], scores
    finally:
        destroy_process_groups()


def ask_in_training(
    config: MM1Config, checkpoint: Path, prompts: list[Prompt], *, max_new_tokens: int
) -> tuple[list[list[int]], bool]:
    """Ids generated before the first step, and whether two steps change every weight as they do when nobody asks."""
    answers: list[list[list[int]]] = []
    trained = []
    for asked in (True, False):
        run = jobs.Run(config)
        run.load_weights(checkpoint)
        losses = []
        for _ in range(2):
            if asked:
                tokenizer = open_tokenizer(config.data.tokenizer)
                engine = Engine(config, run.model, tokenizer, pg_collection=run.groups)
                requests = [GenerationRequest(prompt=prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
                answers.append([list(one.token_ids) for one in engine.generate(requests)])
            losses.append(run.step(run.share(synthetic_batches(config, "mixed")))["loss"])
        weights = [weight.detach().clone() for chunk in run.model for weight in chunk.parameters()]
        trained.append((losses, weights))
        run.close()
    (losses, weights), (other_losses, other_weights) = trained
    same = all(torch.equal(ours, other) for ours, other in zip(weights, other_weights, strict=True))
    return answers[0], losses == other_losses and same


def replicas(config: MM1Config) -> tuple[int, int, bool]:
    """(copies of the model, this rank's copy, whether it speaks for it) of a layout."""
    replica = Replica([], build_process_groups(config.parallel, seed=1))
    destroy_process_groups()
    return replica.count, replica.index, replica.is_leader


@torch.no_grad()
def run_slowly(
    config: MM1Config, checkpoint: Path, prompts: list[Prompt], continuations: list[str], *, max_new_tokens: int
) -> tuple[list[list[int]], list[tuple[float, int]]]:
    """One prompt and one token at a time, without padding, from the logits of the whole model.

    Returns:
        Generated ids, and (summed log-likelihood, tokens) of each continuation with its end of text.
    """
    groups = build_process_groups(config.parallel, seed=1)
    try:
        model: Any = build_module(config, backend="local", pg_collection=groups)
        load_weights(checkpoint, [model], pg_collection=groups)
        model.eval()
        tokenizer = open_tokenizer(config.data.tokenizer)

        def log_probabilities(prompt: Prompt, behind: list[int]) -> torch.Tensor:
            """[S, vocabulary] after each position of the prompt and the tokens behind it."""
            return model(batch_of(config, tokenizer, prompt, behind), return_logits=True)[0].log_softmax(dim=-1)

        generated, scores = [], []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            ids: list[int] = []
            for _ in range(max_new_tokens):
                last = log_probabilities(prompt, ids)[-1, : tokenizer.vocab_size]
                last[[tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id]] = -torch.inf
                token = int(last.argmax())
                if token == tokenizer.eos_id:
                    break
                ids.append(token)
            generated.append(ids)
            target = [*tokenizer.encode(continuation), tokenizer.eos_id]
            predictions = log_probabilities(prompt, target)[-len(target) - 1 : -1]
            scores.append((float(predictions[range(len(target)), target].sum()), len(target)))
        return generated, scores
    finally:
        destroy_process_groups()


def batch_of(config: MM1Config, tokenizer: Tokenizer, prompt: Prompt, behind: list[int]) -> PackedBatch:
    """A prompt and the tokens behind it, as the model sees them in training."""
    per_image, size = config.model.connector.tokens_per_image, config.model.vision.image_size
    tokens, images, slots = [tokenizer.bos_id], [], []
    for part in prompt:
        if isinstance(part, Text):
            tokens += tokenizer.encode(part.text)
        elif isinstance(part, Control):
            tokens.append(tokenizer.control_id(part.symbol))
        elif isinstance(part, Image) and not config.data.text_only:
            images.append(part.data)
            slots.append(range(len(tokens), len(tokens) + per_image))
            tokens += [tokenizer.image_id] * per_image
    row = torch.tensor([tokens + behind])
    groups = ()
    if images:
        pixels, _ = ImageProcessor(size, config.model.vision.image_mean, config.model.vision.image_std)(images)
        groups = (ImageGroup(slots=torch.tensor([list(s) for s in slots]), height=size, width=size, pixels=pixels),)
    return PackedBatch(
        tokens=row,
        labels=torch.full_like(row, IGNORE),
        position_ids=torch.arange(row.shape[1])[None],
        segment_ids=torch.ones_like(row, dtype=torch.int32),
        source_ids=torch.zeros_like(row),
        images=groups,
    )


def lively(config: MM1Config, *, vocab_size: int = 320) -> MM1Config:
    """With large weights: a model this small otherwise repeats one token whatever it sees. 320: more rows than the
    tests' tokenizers have pieces."""
    decoder = dataclasses.replace(config.model.decoder, vocab_size=vocab_size, init_method_std=0.15)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))


def with_data(config: MM1Config, **fields: Any) -> MM1Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
