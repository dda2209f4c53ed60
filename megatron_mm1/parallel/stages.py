"""Pipeline layout as megatron-core's hybrid layer pattern, the one string that says everything about it.

`*` is attention, `-` a dense feed-forward layer, `E` experts, `|` a stage boundary: `*-|*-*E` is a first stage with
one block (beside the tower and connector) and a second with two, the last of which has experts. A block is two layers
of the pattern.
"""

from megatron_mm1.config import MM1Config
from megatron_mm1.config.derived import is_moe_block
from megatron_mm1.planning.pipeline import balanced_stage_blocks


def blocks_per_stage(config: MM1Config) -> list[int]:
    """Decoder blocks on each pipeline stage.

    Tower and connector are on the first stage, which gets fewer blocks: `decoder_first_pipeline_num_layers` of them,
    or as many as balance FLOPs where image tokens take half of each sequence, as in MM1's batches [P].
    """
    num_layers, stages = config.model.decoder.num_layers, config.parallel.pipeline_model_parallel_size
    first = config.parallel.decoder_first_pipeline_num_layers
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
    blocks = ["*E" if is_moe_block(config.model, block) else "*-" for block in range(config.model.decoder.num_layers)]
    stages, start = [], 0
    for count in blocks_per_stage(config):
        stages.append("".join(blocks[start : start + count]))
        start += count
    return "|".join(stages)
