"""Held-out loss per source, with each image and with images exchanged; the training state does not move."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm1.config import MM1Config
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.parallel.device import device
from megatron_mm1.training.build import Model
from megatron_mm1.training.step import evaluate_batches


def validate_model(
    config: MM1Config,
    model: Model,
    sources: Mapping[str, Callable[[], Iterator[PackedBatch]]],
    *,
    pg_collection: ProcessGroupCollection,
) -> dict[str, float]:
    """Mean loss per trained token of each source.

    Returns:
        `{source}` and, where a source has images, `{source}, images exchanged`: the same batches with every image
        replaced by another of the same pass. What the second exceeds the first by is what the model gets from
        looking.
    """
    losses = {}
    for name, batches_of in sources.items():
        batches = list(batches_of())
        losses[name] = evaluate_batches(config, model, batches, pg_collection=pg_collection).loss
        if _any_rank(any(batch.num_images for batch in batches), pg_collection):
            exchanged = exchange_images(batches)
            losses[f"{name}, images exchanged"] = evaluate_batches(
                config, model, exchanged, pg_collection=pg_collection
            ).loss
    return losses


def _any_rank(flag: bool, pg_collection: ProcessGroupCollection) -> bool:
    """Whether the flag is set on some data-parallel rank: all of them must run the same passes."""
    flags = torch.tensor(float(flag), device=device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=pg_collection.dp_cp)
    return bool(flags)


def exchange_images(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The same batches with the images of each size moved on by one place, the last to the first.

    On ranks that hold no pixels there is nothing to move; the only image of its size on a rank stays where it is. Ranks
    exchange among their own images, so the loss depends a little on the data-parallel size.
    """
    by_size: dict[tuple[int, int], list[torch.Tensor]] = {}
    for batch in batches:
        for group in batch.images:
            if group.pixels is not None:
                by_size.setdefault((group.height, group.width), []).append(group.pixels)
    moved = {
        size: iter(torch.cat(pixels).roll(1, dims=0).split([len(part) for part in pixels]))
        for size, pixels in by_size.items()
    }
    return [
        replace(
            batch,
            images=tuple(
                group if group.pixels is None else replace(group, pixels=next(moved[group.height, group.width]))
                for group in batch.images
            ),
        )
        for batch in batches
    ]
