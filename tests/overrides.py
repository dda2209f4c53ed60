"""Configurations as a preset and options, and what validation says of them."""

from megatron_mm1.config.loading import load_config
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError

BF16 = "--precision bf16"
ZERO = "--use_distributed_optimizer"
TP = "--tensor_model_parallel_size"
PP = "--pipeline_model_parallel_size"
EP = "--expert_model_parallel_size"
SP = "--sequence_parallel"
CP = "--context_parallel_size"
VPP = "--virtual_pipeline_model_parallel_size"
PATTERN = "--hybrid_layer_pattern"
ETP = "--expert_tensor_parallel_size"
FIRST = "--decoder_first_pipeline_num_layers"
HEADS = "--model.decoder.num_attention_heads"


def problems(base: str, arguments: str, world_size: int) -> tuple[str, ...]:
    config = load_config(["--preset", base, *arguments.split()])
    try:
        validate(config, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return ()
