"""Pipeline layout as megatron-core's hybrid layer pattern, the one string that says everything about it.

`*` is attention, `-` a dense feed-forward layer, `E` experts, `|` a stage boundary: `*-|*-*E` is a first stage with
one block (beside the tower and connector) and a second with two, the last of which has experts. A block is two layers
of the pattern. With virtual stages the boundaries cut PP x VPP stages, and rank r has stages r, r + PP, ..
"""

from itertools import accumulate

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import block_pattern
from megatron_mm1.planning.pipeline import balanced_stage_blocks


def blocks_per_stage(config: MM1Config) -> list[int]:
    """Decoder blocks on each pipeline stage, virtual ones counted apart.

    Tower and connector are on the first stage, which gets fewer blocks: `decoder_first_pipeline_num_layers` of them,
    or as many as balance FLOPs where image tokens take half of each sequence, as in MM1's batches [P].
    """
    num_layers, parallel = config.model.decoder.num_layers, config.parallel
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    first = parallel.decoder_first_pipeline_num_layers
    if first is None or stages == 1:
        images = config.data.seq_length / 2 / config.model.connector.tokens_per_image
        return balanced_stage_blocks(
            config.model,
            pipeline_size=stages,
            seq_length=config.data.seq_length,
            images_per_sequence=min(images, config.data.max_images_per_sequence),
        )
    each, extra = divmod(num_layers - first, stages - 1)
    return [first, *(each + (stage < extra) for stage in range(stages - 1))]


def layer_pattern(config: MM1Config) -> str:
    """The decoder's layer pattern under `config.parallel`."""
    if config.parallel.hybrid_layer_pattern is not None:
        return config.parallel.hybrid_layer_pattern
    pattern, counts = block_pattern(config.model), blocks_per_stage(config)
    ends = list(accumulate(counts))
    return "|".join(pattern[2 * (end - count) : 2 * end] for end, count in zip(ends, counts, strict=True))
