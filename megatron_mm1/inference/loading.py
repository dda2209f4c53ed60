"""An engine from a checkpoint, in the layout of the processes that are there."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.config import Fp8Config, MM1Config
from megatron_mm1.config.validation import validate
from megatron_mm1.data.chat import Chat
from megatron_mm1.data.tiling import Kind
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.errors import UserError
from megatron_mm1.inference.engine import Engine
from megatron_mm1.parallel.device import layer_backend
from megatron_mm1.parallel.groups import (
    build_process_groups,
    destroy_process_groups,
    initialize_process_group,
    launcher_ranks,
)
from megatron_mm1.training.build import build_module
from megatron_mm1.training.checkpointing import load_weights
from megatron_mm1.training.resume import check_tokenizer


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """A layout for inference; None: the checkpoint's, or 1 where there is one process only."""

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    expert_model_parallel_size: int | None = None

    @classmethod
    def of(cls, args: Namespace) -> "ParallelSizes":
        """From command-line arguments of these names."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


AS_TRAINED = ParallelSizes()


@contextmanager
def open_engine(
    checkpoint: Path,
    *,
    sizes: ParallelSizes = AS_TRAINED,
    batch_size: int = 64,
    images_together: int | None = None,
    image_tiling: Kind | None = None,
    max_image_tiles: int | None = None,
    chat: Chat | None = None,
    tokenizer: Path | None = None,
) -> Iterator[Engine]:
    """Join the job, load the checkpoint's weights, and leave the job when the block ends.

    Args:
        checkpoint: a checkpoint, or a folder of them (the newest is taken).
        batch_size, images_together: see `Engine`.
        image_tiling: how images become tiles, instead of what the model was trained with.
        max_image_tiles: of a dynamic grid, instead of the same (MM1.5 asks with up to 16 [P]).
        chat: for a model that was trained on conversations.
        tokenizer: where the one it was trained with is; None: where training found it.

    Raises:
        UserError: the checkpoint, its tokenizer or chat template, the layout or so many tiles cannot be used.
    """
    checkpoint = find_checkpoint(checkpoint)
    metadata = read_metadata(checkpoint)
    world_size = launcher_ranks()[1]
    config = inference_config(metadata.mm1_config(), sizes=sizes, world_size=world_size)
    if tokenizer is not None:
        config = replace(config, data=replace(config.data, tokenizer=str(tokenizer)))
    if image_tiling is not None:
        config = with_tiling(config, image_tiling)
    if max_image_tiles is not None:
        config = with_grids(config, max_image_tiles=max_image_tiles)
    validate(config, world_size=world_size)
    backend = layer_backend(config)
    opened = open_tokenizer(config.data.tokenizer)
    check_tokenizer(metadata, opened.fingerprint)
    template = None if chat is None else chat.open(opened)
    initialize_process_group(timeout_minutes=config.parallel.distributed_timeout_minutes)
    try:
        groups = build_process_groups(config.parallel, seed=config.training.seed)
        model = build_module(config, backend=backend, pg_collection=groups)
        if missing := load_weights(checkpoint, [model], pg_collection=groups):
            raise UserError(f"{checkpoint} lacks the {' and the '.join(missing)}: train from it first")
        yield Engine(
            config,
            model,
            opened,
            pg_collection=groups,
            batch_size=batch_size,
            images_together=images_together,
            chat=template,
        )
        torch.distributed.barrier()
        destroy_process_groups()
    finally:
        torch.distributed.destroy_process_group()


def with_tiling(config: MM1Config, kind: Kind) -> MM1Config:
    """A model that cuts images into tiles in another way than in training, or not at all.

    Raises:
        UserError: an image in so many tiles is longer than the model's sequences.
    """
    most = {"none": 1, "overview_and_crops": 5, "dynamic": config.data.max_image_tiles + 1}[kind]
    indicators = config.data.tile_indicators and kind != "none"
    data = replace(config.data, image_tiling=kind, tile_indicators=indicators)
    return _with_room(replace(config, data=data), most, asked=f"image tiling {kind}")


def with_grids(config: MM1Config, *, max_image_tiles: int) -> MM1Config:
    """A model that cuts images into other grids than in training.

    Raises:
        UserError: it cuts images into no grids that could be larger or smaller, or so many tiles are longer than its
            sequences.
    """
    data, asked = config.data, f"max_image_tiles {max_image_tiles}"
    if data.image_tiling != "dynamic":
        raise UserError(
            f"{asked}: this model's data.image_tiling is {data.image_tiling}, and only dynamic grids have more or "
            "fewer tiles: leave it out"
        )
    tiles = replace(data, min_image_tiles=min(data.min_image_tiles, max_image_tiles), max_image_tiles=max_image_tiles)
    return _with_room(replace(config, data=tiles), max_image_tiles + 1, asked=asked)


def _with_room(config: MM1Config, most: int, *, asked: str) -> MM1Config:
    """With room for one image in `most` tiles, the whole counted."""
    data, tokens = config.data, config.model.connector.tokens_per_image
    if most * tokens + 2 > data.seq_length:
        raise UserError(
            f"{asked}: {most} tiles of {tokens} tokens do not fit the {data.seq_length} positions of this model's "
            "sequences: leave it out, or ask for fewer tiles"
        )
    return replace(config, data=replace(data, max_images_per_sequence=max(data.max_images_per_sequence, most)))


def inference_config(saved: MM1Config, *, sizes: ParallelSizes, world_size: int) -> MM1Config:
    """A checkpoint's configuration in another layout, without what only training needs."""
    before = saved.parallel

    def size(asked: int | None, trained: int) -> int:
        return asked or (trained if world_size > 1 else 1)

    tensor = size(sizes.tensor_model_parallel_size, before.tensor_model_parallel_size)
    pipeline = size(sizes.pipeline_model_parallel_size, before.pipeline_model_parallel_size)
    same_stages = pipeline == before.pipeline_model_parallel_size and before.virtual_pipeline_model_parallel_size == 1
    parallel = replace(
        before,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=size(sizes.expert_model_parallel_size, before.expert_model_parallel_size),
        sequence_parallel=tensor > 1 and (before.sequence_parallel or saved.model.moe is not None),
        virtual_pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_tensor_parallel_size=1,
        decoder_first_pipeline_num_layers=before.decoder_first_pipeline_num_layers if same_stages else None,
        hybrid_layer_pattern=before.hybrid_layer_pattern if same_stages else None,
        use_distributed_optimizer=False,
        overlap_grad_reduce=False,
    )
    # Validation wants a global batch that the processes divide.
    batch = saved.training.micro_batch_size * world_size
    training = replace(saved.training, global_batch_size=batch, batch_size_ramp=(), freeze=(), frozen_steps={})
    return replace(saved, parallel=parallel, training=training, fp8=Fp8Config())
