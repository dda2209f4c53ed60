"""What benchmarks/gpu.py runs: slices of presets that fit one 80 GB card, the variants of each, and their batches.

A slice has the preset's true widths, tower, connector, vocabulary and sequence, and as many decoder blocks as fit. Of
experts it has one rank's share under expert parallelism of 8: every rank then gets as many tokens from the others as it
sends to them, so that the slice's experts have the load of the whole model's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from megatron_mm1.config import MM1Config, ParallelConfig
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import Fp8Config, Fp8Recipe
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.errors import UserError
from megatron_mm1.planning.flops import decoder_flops, step_flops, tower_flops
from megatron_mm1.planning.memory import GIB, RankMemory, plan_memory

MEMORY_LIMIT = 72 * GIB
EXPERT_PARALLEL_SIZE = 8
DEFAULT_SLICES = ("mm1-30b", "mm1-7b", "mm1-3b-moe")
IMAGE_ID = 3


@dataclass(frozen=True)
class Variant:
    """How a slice is run: by this package with an FP8 recipe (or none), or as the plain torch model."""

    name: str
    recipe: Fp8Recipe = "bf16"
    is_peer: bool = False

    def configure(self, config: MM1Config) -> MM1Config:
        """The slice with the recipe in decoder, experts and tower; the connector stays in bf16."""
        return replace(config, fp8=Fp8Config(decoder_recipe=self.recipe, tower_recipe=self.recipe))


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("bf16"),
        Variant("fp8_tensorwise", recipe="fp8_tensorwise"),
        Variant("torch", is_peer=True),
        Variant("fp8_blockwise", recipe="fp8_blockwise"),
        Variant("fp8_delayed", recipe="fp8_delayed"),
    )
}
"""In order of importance."""


@dataclass(frozen=True)
class Slice:
    """A preset cut to `config`, which runs on one device in one process.

    Attributes:
        preset: what it is cut from.
        config: one microbatch is one sequence; `training.global_batch_size` microbatches make a step.
    """

    preset: str
    config: MM1Config

    @property
    def is_dense(self) -> bool:
        return self.config.model.moe is None

    @property
    def positions(self) -> int:
        """Of one step."""
        return self.config.training.global_batch_size * self.config.data.seq_length

    def memory(self, variant: Variant) -> RankMemory:
        """Planned for one process."""
        (memory,) = plan_memory(variant.configure(self.config), world_size=1)
        if variant.is_peer:  # gradients and moments are bf16, and there are no master weights
            memory = replace(memory, gradients=memory.weights, optimizer=2 * memory.weights)
        return memory

    def decoder_flops(self) -> float:
        """Model FLOPs of the decoder and its output layer on one microbatch, forward and backward."""
        return decoder_flops(
            self.config.model, seq_length=self.config.data.seq_length, segment_length=self.segment_length()
        )

    def tower_flops(self) -> float:
        """Model FLOPs of the tower on one microbatch, forward and backward."""
        return self.config.data.max_images_per_sequence * tower_flops(self.config.model)

    def step_flops(self) -> float:
        """Model FLOPs of one step: causal attention within examples, nothing recomputed, tower and connector in."""
        sequences = self.config.training.global_batch_size
        return step_flops(
            self.config.model,
            seq_length=self.config.data.seq_length,
            num_sequences=sequences,
            num_images=sequences * self.config.data.max_images_per_sequence,
            segment_length=self.segment_length(),
        )

    def segment_length(self) -> float:
        """The length of examples that costs attention what those of `example_lengths` do, mean over positions."""
        lengths = example_lengths(self.config)
        return sum(length**2 for length in lengths) / sum(lengths)


def cut(name: str, *, microbatches: int = 4, limit: int = MEMORY_LIMIT) -> Slice:
    """The slice of preset `name`: as many decoder blocks as fit `limit` bytes in every variant.

    Whole periods of dense and expert blocks, and at least two blocks.

    Raises:
        UserError: not even the smallest slice fits.
    """
    config = _on_one_device(preset(name), microbatches=microbatches)
    moe = config.model.moe
    period = 1 if moe is None else moe.moe_layer_freq
    fewest = period * -(-2 // period)
    if config.model.decoder.num_layers < fewest:
        raise UserError(f"{name} has {config.model.decoder.num_layers} decoder blocks, and a slice at least {fewest}")
    deepest = config.model.decoder.num_layers // period * period
    for blocks in range(deepest, fewest - 1, -period):
        candidate = Slice(name, _with_blocks(config, blocks))
        needed = max((candidate.memory(variant) for variant in VARIANTS.values()), key=lambda memory: memory.total)
        if needed.total <= limit:
            return candidate
    raise UserError(
        f"{fewest} decoder blocks of {name} need {needed.total / GIB:.1f} GiB ({needed}), and {limit / GIB:.1f} GiB "
        "are allowed: no smaller slice has its shapes, so use a preset that is less wide or fewer data.seq_length"
    )


def jobs(slices: Sequence[Slice], variants: Sequence[Variant]) -> Iterator[tuple[Slice, Variant]]:
    """Every pair in order of importance: all of the first slice, then variant by variant of the others."""
    yield from product(slices[:1], variants)
    for variant in variants:
        yield from ((piece, variant) for piece in slices[1:])


def example_images(config: MM1Config) -> tuple[int, ...]:
    """Images of each packed example: half of a sequence's in the first, half of the rest in the next: 8, 4, 2, 1, 1.

    Documents and captions in one sequence, so that attention has long and short examples.
    """
    left, counts = config.data.max_images_per_sequence, []
    while left > 1:
        counts.append(left // 2)
        left -= counts[-1]
    return (*counts, left)


def example_lengths(config: MM1Config) -> tuple[int, ...]:
    """Positions of each packed example: they fill the sequence, text about in proportion to images.

    A few positions, an odd number and each time another, go to the last example instead: kernels get no lengths that
    are multiples of anything.
    """
    images, tokens = example_images(config), config.model.connector.tokens_per_image
    text = config.data.seq_length - sum(images) * tokens
    lengths = [
        count * tokens + text * count // sum(images) - (2 * number + 3) for number, count in enumerate(images[:-1])
    ]
    return (*lengths, config.data.seq_length - sum(lengths))


def packed_batches(config: MM1Config) -> list[PackedBatch]:
    """Random microbatches of one step, on the host: sequences of the same examples, filled to the last position.

    In an example, a token of text precedes each image, and the rest of its text follows the last one.
    """
    generator = torch.Generator().manual_seed(config.training.seed)
    return [_packed_batch(config, generator) for _ in range(config.training.global_batch_size)]


def _packed_batch(config: MM1Config, generator: torch.Generator) -> PackedBatch:
    length, per_image = config.data.seq_length, config.model.connector.tokens_per_image
    images, lengths = example_images(config), torch.tensor(example_lengths(config))
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(length) - starts.repeat_interleave(lengths)
    firsts = [
        start + 1 + number * (per_image + 1)
        for start, count in zip(starts.tolist(), images, strict=True)
        for number in range(count)
    ]
    slots = torch.tensor(firsts)[:, None] + torch.arange(per_image)
    tokens = torch.randint(10, config.model.decoder.vocab_size, (1, length), generator=generator)
    tokens[0, slots.flatten()] = IMAGE_ID
    labels = tokens.roll(-1, dims=1)
    labels[labels == IMAGE_ID] = IGNORE
    labels[0, starts - 1] = IGNORE  # the last position of each example; -1 is the sequence's
    side = config.model.vision.image_size
    pixels = torch.randn(len(slots), 3, side, side, generator=generator)
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        position_ids=within[None],
        segment_ids=torch.arange(1, len(lengths) + 1, dtype=torch.int32).repeat_interleave(lengths)[None],
        source_ids=torch.zeros_like(tokens),
        images=(ImageGroup(slots=slots, height=side, width=side, pixels=pixels),),
    )


def _on_one_device(config: MM1Config, *, microbatches: int) -> MM1Config:
    """The preset in bf16 on one device, without data, with a rank's share of its experts."""
    model = config.model
    if model.moe is not None:
        share = max(model.moe.num_moe_experts // EXPERT_PARALLEL_SIZE, model.moe.moe_router_topk)
        model = replace(model, moe=replace(model.moe, num_moe_experts=share))
    return replace(
        config,
        model=model,
        parallel=ParallelConfig(),
        data=replace(config.data, sources=(), validation=()),
        training=replace(
            config.training,
            micro_batch_size=1,
            global_batch_size=microbatches,
            precision="bf16",
            layer_backend="auto",
        ),
    )


def _with_blocks(config: MM1Config, blocks: int) -> MM1Config:
    decoder = replace(config.model.decoder, num_layers=blocks)
    return replace(config, model=replace(config.model, decoder=decoder))
