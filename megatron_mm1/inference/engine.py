"""Text out of a model: greedy generation, and the likelihood of given text, under any parallel layout."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm1.config import MM1Config
from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.batch import IGNORE, PackedBatch
from megatron_mm1.data.images import ImageProcessor
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.source import Piece
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.parallel.device import device
from megatron_mm1.training.build import unwrap

Prompt = Sequence[Text | Image]
"""What the model is given: text and images in reading order, tokenized part by part as training data is."""


@dataclass(frozen=True)
class Score:
    """Likelihood of a continuation.

    Attributes:
        log_likelihood: summed over its tokens, nats.
        num_tokens: its tokens, the end of text included.
    """

    log_likelihood: float
    num_tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.log_likelihood / self.num_tokens


@dataclass(frozen=True)
class _ImageTokens:
    """Images of a batch, encoded once however many rows show them.

    Attributes:
        tokens: [images, tokens_per_image, hidden_size]; None on ranks that do not encode.
        index: which of them an image's bytes are.
    """

    tokens: Tensor | None
    index: dict[bytes, int]

    def of(self, pieces: Sequence[Piece]) -> Tensor | None:
        """The image tokens of `pieces`, in reading order; None where they have no image."""
        if self.tokens is None or not any(piece.images for piece in pieces):
            return None
        images = [self.index[image] for piece in pieces for image in piece.images if image is not None]
        return self.tokens[torch.tensor(images, dtype=torch.int64, device=self.tokens.device)]


class Engine:
    """Runs a model forward on prompts. All ranks of a replica call it with the same arguments and get the same results.

    Args:
        config: of the model, in the layout of `pg_collection`.
        model: this rank's stage, with its weights.
        pg_collection: the process groups of this layout.
        batch_size: prompts that run together.
    """

    def __init__(
        self,
        config: MM1Config,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        *,
        pg_collection: ProcessGroupCollection,
        batch_size: int = 64,
    ) -> None:
        self.config = config
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pg_collection = pg_collection
        self.batch_size = batch_size
        if config.data.image_tiling != "none" and not config.data.text_only:
            raise UserError(
                f"this model was trained with data.image_tiling {config.data.image_tiling}: inference takes whole "
                "images only and cannot run it"
            )
        self._processor = ImageProcessor.of(config)
        self._assembler = Assembler.of(config, tokenizer)

    @property
    def num_replicas(self) -> int:
        """How many copies of the model the job holds; each can work on prompts of its own."""
        groups = self.pg_collection
        return groups.dp.size() * groups.tp.size() // self._replica_span

    @property
    def replica(self) -> int:
        """Which copy this rank belongs to."""
        return self._rank_in_stage // self._replica_span

    @property
    def is_replica_leader(self) -> bool:
        """True on one rank of each copy."""
        return self.pg_collection.pp.rank() == 0 and self._rank_in_stage % self._replica_span == 0

    @property
    def _replica_span(self) -> int:
        """Ranks of a pipeline stage that must run in step: those that share tensors or experts."""
        return math.lcm(self.pg_collection.tp.size(), self.pg_collection.ep.size())

    @property
    def _rank_in_stage(self) -> int:
        return self.pg_collection.dp.rank() * self.pg_collection.tp.size() + self.pg_collection.tp.rank()

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        """Continue each prompt greedily until the end of text or `max_new_tokens` tokens.

        The whole sequence runs again for every token: there is no key/value cache yet. Of equally likely tokens the
        lowest id is taken; images, padding and the beginning of text are never generated.

        Raises:
            UserError: an image cannot be decoded, or a prompt and its continuation do not fit the model's sequence.
        """
        return [self.tokenizer.decode(ids) for ids in self.generate_ids(prompts, max_new_tokens=max_new_tokens)]

    @torch.no_grad()
    def generate_ids(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[list[int]]:
        """Token ids of what `generate` returns, without the end of text."""
        pieces = [self._piece(prompt) for prompt in prompts]
        self._check_lengths(pieces, new_tokens=max_new_tokens)
        generated: list[list[int]] = [[] for _ in prompts]
        for batch in self._batches(pieces):
            image_tokens = self._encode([pieces[index] for index in batch])
            unfinished = batch
            for _ in range(max_new_tokens):
                so_far = [_extend(pieces[index], generated[index]) for index in unfinished]
                tokens = self._run(so_far, image_tokens, self._next_tokens, return_logits=True)
                going_on = []
                for index, token in zip(unfinished, map(int, tokens), strict=True):
                    if token != self.tokenizer.eos_id:
                        generated[index].append(token)
                        going_on.append(index)
                unfinished = going_on
                if not unfinished:
                    break
        return generated

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """How likely each continuation, and the end of the text after it, is behind its prompt.

        Raises:
            UserError: as `generate`.
        """
        pieces = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            ids = [*self.tokenizer.encode(continuation), self.tokenizer.eos_id]
            pieces.append(_extend(self._piece(prompt), ids, trained=True))
        self._check_lengths(pieces)
        scores: dict[int, Score] = {}
        for batch in self._batches(pieces):
            members = [pieces[index] for index in batch]
            sums = self._run(members, self._encode(members), _log_likelihoods)
            for index, piece, log_likelihood in zip(batch, members, sums, strict=True):
                scores[index] = Score(log_likelihood=log_likelihood, num_tokens=int(piece.trained.sum()))
        return [scores[index] for index in range(len(pieces))]

    def _piece(self, prompt: Prompt) -> Piece:
        """A prompt as a stored document has it, but without the end of text and with nothing trained."""
        tokens = [self.tokenizer.bos_id]
        for part in prompt:
            tokens += [self.tokenizer.image_id] if isinstance(part, Image) else self.tokenizer.encode(part.text)
        return Piece(
            tokens=np.asarray(tokens, np.int64),
            trained=np.zeros(len(tokens), bool),
            images=tuple(part.data for part in prompt if isinstance(part, Image)),
        )

    def _length(self, piece: Piece) -> int:
        per_image = 0 if self._assembler.text_only else self._assembler.tokens_per_image
        return len(piece.tokens) + len(piece.images) * (per_image - 1)

    def _check_lengths(self, pieces: Sequence[Piece], *, new_tokens: int = 0) -> None:
        longest, limit = max(map(self._length, pieces), default=0), self.config.data.seq_length
        if longest + new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} positions and {new_tokens} new tokens do not fit the {limit} positions the "
                "model was trained with: shorten the prompt or ask for fewer tokens"
            )

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        """Indices of pieces that run together, of similar length so that little is padded."""
        order = sorted(range(len(pieces)), key=lambda index: self._length(pieces[index]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _encode(self, pieces: Sequence[Piece]) -> _ImageTokens:
        """Encode every image of `pieces`, on the first pipeline stage."""
        stored = [] if self._assembler.text_only else [image for piece in pieces for image in piece.images]
        images = [image for image in stored if image is not None]  # a prompt has none that is damaged
        distinct = list(dict.fromkeys(images))
        index = {image: number for number, image in enumerate(distinct)}
        if not distinct or self.pg_collection.pp.rank() > 0:
            return _ImageTokens(tokens=None, index=index)
        encoded = []
        for start in range(0, len(distinct), self.batch_size):
            pixels, decoded = self._processor(distinct[start : start + self.batch_size])
            if not all(decoded):
                raise UserError(f"image {start + decoded.index(False) + 1} of the prompts cannot be decoded")
            encoded.append(unwrap(self.model).encode(pixels.to(device())))
        return _ImageTokens(tokens=torch.cat(encoded), index=index)

    def _assemble(self, pieces: Sequence[Piece]) -> PackedBatch:
        """One piece per row, padded on the right to a length that sequence parallelism can split."""
        multiple = self.pg_collection.tp.size() if self.config.parallel.sequence_parallel else 1
        seq_length = -(-max(map(self._length, pieces)) // multiple) * multiple
        assembler = replace(self._assembler, seq_length=seq_length)
        return assembler([Row([0], [piece]) for piece in pieces]).to(device())

    def _run(
        self,
        pieces: Sequence[Piece],
        image_tokens: _ImageTokens,
        read: Callable[[PackedBatch, Tensor], Tensor],
        *,
        return_logits: bool = False,
    ) -> list[float]:
        """One forward pass through all pipeline stages.

        Args:
            read: makes one number per row ([B], any dtype) out of what the last stage returns.
        """
        batch = self._assemble(pieces)
        features = image_tokens.of(pieces)
        forward = partial(
            _forward_step, image_tokens=() if features is None else (features,), read=read, return_logits=return_logits
        )
        groups = self.pg_collection
        stages = groups.pp.size()
        transformer_config = unwrap(self.model).config
        outputs = get_forward_backward_func(pp_size=stages, vp_size=None)(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=batch.tokens.numel(),  # the decoder sees a microbatch as one flattened sequence
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=transformer_config) if stages > 1 else None,
            pg_collection=groups,
        )
        numbers = outputs[0].double() if outputs else torch.empty(len(pieces), dtype=torch.float64, device=device())
        # Every rank must take the same decisions: what it computed itself could differ from its peers' by rounding.
        torch.distributed.broadcast(numbers, group_src=stages - 1, group=groups.pp)
        for group in (groups.tp, groups.ep):
            torch.distributed.broadcast(numbers, group_src=0, group=group)
        return numbers.tolist()

    def _next_tokens(self, batch: PackedBatch, logits: Tensor) -> Tensor:
        """[B] the likeliest token after each row's last, of those that text is made of."""
        last = (batch.segment_ids > 0).sum(dim=1) - 1
        logits = logits[torch.arange(len(last), device=last.device), last, : self.tokenizer.vocab_size].float()
        ids = self.tokenizer
        for token in {ids.image_id, ids.pad_id, ids.bos_id} - {ids.eos_id}:  # one id may both pad and end texts
            logits[:, token] = -math.inf
        return logits.argmax(dim=-1)  # the first of equals


def _forward_step(
    batches: Iterator[PackedBatch],
    model: torch.nn.Module,
    *,
    image_tokens: Sequence[Tensor],
    read: Callable[[PackedBatch, Tensor], Tensor],
    return_logits: bool,
) -> tuple[Tensor, Callable[..., Tensor]]:
    """As the schedule wants it: the stage's output, and what turns the last stage's into the result."""
    batch = next(batches)
    output = model(batch, image_tokens=image_tokens, return_logits=return_logits)
    return output, lambda output, non_loss_data: read(batch, output)


def _log_likelihoods(batch: PackedBatch, losses: Tensor) -> Tensor:
    """[B] the summed log-likelihood of each row's trained tokens."""
    return -losses.double().view_as(batch.labels).masked_fill(batch.labels == IGNORE, 0.0).sum(dim=1)


def _extend(piece: Piece, ids: Sequence[int], *, trained: bool = False) -> Piece:
    """`piece` with more text behind it."""
    return replace(
        piece,
        tokens=np.concatenate([piece.tokens, np.asarray(ids, np.int64)]),
        trained=np.concatenate([piece.trained, np.full(len(ids), trained)]),
    )
