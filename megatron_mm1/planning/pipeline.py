"""How many decoder blocks each pipeline stage gets."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from megatron_mm1.config.schema import ModelConfig
from megatron_mm1.errors import ConfigError
from megatron_mm1.planning.flops import decoder_block_flops, output_flops, vision_flops


def balanced_stage_blocks(
    model: ModelConfig, *, pipeline_size: int, seq_length: int, images_per_sequence: float
) -> list[int]:
    """Decoder blocks per stage such that the slowest stage has the fewest FLOPs.

    Tower and connector are on the first stage, the output layer on the last; every stage has at least one block.

    Args:
        pipeline_size: stages.
        images_per_sequence: mean number of images in a sequence of `seq_length` positions.

    Returns:
        `pipeline_size` counts that add up to the decoder's blocks.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    blocks = [
        decoder_block_flops(model, seq_length=seq_length, block=block) for block in range(model.decoder.num_layers)
    ]
    return balanced_split(
        blocks,
        pipeline_size=pipeline_size,
        first_extra=images_per_sequence * vision_flops(model),
        last_extra=output_flops(model, seq_length=seq_length),
    )


def balanced_split(
    costs: Sequence[float], *, pipeline_size: int, first_extra: float = 0.0, last_extra: float = 0.0
) -> list[int]:
    """Splits `costs` into consecutive stages with the least maximum and, at that, the least sum of squares.

    Args:
        costs: of each block, in order.
        first_extra, last_extra: cost of what else is on the first and the last stage.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    if not 1 <= pipeline_size <= len(costs):
        raise ConfigError(
            [f"pipeline_model_parallel_size {pipeline_size} does not split {len(costs)} blocks: use 1 to {len(costs)}"]
        )
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def stage_cost(stage: int, start: int, end: int) -> float:
        extra = first_extra * (stage == 0) + last_extra * (stage == pipeline_size - 1)
        return before[end] - before[start] + extra

    def best(limit: float, combine: Callable[[float, float], float]) -> list[int]:
        """The counts with the least combined cost and no stage above `limit`: stage by stage, the best for each end."""
        table: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(pipeline_size):
            extended: dict[int, tuple[float, list[int]]] = {}
            for end in range(stage + 1, len(costs) + 1) if stage < pipeline_size - 1 else [len(costs)]:
                candidates = [
                    (combine(value, cost), [*counts, end - start])
                    for start, (value, counts) in table.items()
                    if start < end and (cost := stage_cost(stage, start, end)) <= limit
                ]
                if candidates:
                    extended[end] = min(candidates)
            table = extended
        return table[len(costs)][1]

    def slowest(counts: Sequence[int]) -> float:
        ends = list(accumulate(counts))
        return max(
            stage_cost(stage, end - count, end) for stage, (count, end) in enumerate(zip(counts, ends, strict=True))
        )

    limit = slowest(best(math.inf, max))
    return best(limit, lambda total, cost: total + cost**2)
