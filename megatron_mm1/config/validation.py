"""Whether a configuration can run: every problem at once, with its numbers and the fix. No file or device is read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_mm1.config.derived import head_dim, num_moe_blocks, num_patches, num_query_groups, num_vision_blocks
from megatron_mm1.config.keys import value_at
from megatron_mm1.config.schema import MM1Config, SourceConfig
from megatron_mm1.errors import ConfigError

MINIMUM: dict[str, int] = {
    "model.decoder.num_layers": 1,
    "model.decoder.hidden_size": 1,
    "model.decoder.ffn_hidden_size": 1,
    "model.decoder.num_attention_heads": 1,
    "model.decoder.num_query_groups": 1,
    "model.decoder.kv_channels": 1,
    "model.decoder.vocab_size": 1,
    "model.vision.image_size": 1,
    "model.vision.patch_size": 1,
    "model.vision.num_layers": 1,
    "model.vision.hidden_size": 1,
    "model.vision.ffn_hidden_size": 1,
    "model.vision.num_attention_heads": 1,
    "model.connector.tokens_per_image": 1,
    "model.connector.hidden_size": 1,
    "model.connector.num_layers": 1,
    "model.connector.num_attention_heads": 1,
    "model.moe.num_moe_experts": 1,
    "model.moe.moe_layer_freq": 1,
    "model.moe.moe_ffn_hidden_size": 1,
    "model.moe.moe_router_topk": 1,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.expert_model_parallel_size": 1,
    "parallel.distributed_timeout_minutes": 1,
    "data.seq_length": 2,
    "data.max_images_per_sequence": 0,
    "data.packing_lookahead": 1,
    "data.num_workers": 0,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 1,
    "training.train_iters": 1,
    "training.eval_interval": 0,
    "training.eval_iters": 1,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.lr_decay_iters": 1,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "optimizer.vision_lr": 0,
    "optimizer.connector_lr": 0,
    "checkpoint.save_interval": 0,
    "logging.log_interval": 1,
}
"""The smallest legal value of each key that counts or measures something; null is legal where the schema has it."""


@dataclass(frozen=True)
class Rule:
    """A check and the keys (or groups) it reads: it is skipped where one of them is below its minimum."""

    reads: tuple[str, ...]
    problems: Callable[[MM1Config, int], Iterator[str]]


def validate(config: MM1Config, *, world_size: int) -> None:
    """Checks a configuration against itself and the number of processes.

    Raises:
        ConfigError: every problem found.
    """
    values = {path: value_at(config, path) for path in MINIMUM}
    too_small = [path for path, value in values.items() if value is not None and value < MINIMUM[path]]
    problems = [f"{path} {values[path]} is too small: use {MINIMUM[path]} or more" for path in too_small]
    for rule in RULES:
        if not any(path.startswith(rule.reads) for path in too_small):
            problems += rule.problems(config, world_size)
    if problems:
        raise ConfigError(problems)


def _decoder_shape(config: MM1Config, world_size: int) -> Iterator[str]:
    decoder = config.model.decoder
    heads, groups = decoder.num_attention_heads, num_query_groups(decoder)
    if decoder.kv_channels is None and decoder.hidden_size % heads:
        yield (
            f"decoder.hidden_size {decoder.hidden_size} is not divisible by num_attention_heads {heads}: "
            f"change one of them, or set kv_channels"
        )
    elif head_dim(decoder) % 2:
        yield f"the decoder's head dim {head_dim(decoder)} is odd, and rotary embedding turns pairs: use an even one"
    if heads % groups:
        yield f"num_attention_heads {heads} is not divisible by num_query_groups {groups}: use {_divisors(heads)}"


def _decoder_tensor_parallel(config: MM1Config, world_size: int) -> Iterator[str]:
    decoder, size = config.model.decoder, config.parallel.tensor_model_parallel_size
    if decoder.num_attention_heads % size:
        yield _not_split("num_attention_heads", decoder.num_attention_heads, size)
    if decoder.num_query_groups is not None and decoder.num_query_groups % size:
        yield _not_split("num_query_groups", decoder.num_query_groups, size)
    if decoder.ffn_hidden_size % size:
        yield _not_split("ffn_hidden_size", decoder.ffn_hidden_size, size)


def _vision_shape(config: MM1Config, world_size: int) -> Iterator[str]:
    vision = config.model.vision
    if vision.image_size % vision.patch_size:
        below = vision.image_size // vision.patch_size * vision.patch_size
        sizes = " or ".join(str(size) for size in (below, below + vision.patch_size) if size)
        yield (
            f"vision.image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}: "
            f"use image_size {sizes}"
        )
    if vision.hidden_size % vision.num_attention_heads:
        yield (
            f"vision.hidden_size {vision.hidden_size} is not divisible by vision.num_attention_heads "
            f"{vision.num_attention_heads}: change one of them"
        )
    if not 1 <= num_vision_blocks(vision) <= vision.num_layers:
        yield (
            f"vision.feature_layer {vision.feature_layer} is not a layer of a tower of {vision.num_layers}: "
            f"use -1 (the last) to {-vision.num_layers} (the first)"
        )


def _vision_tensor_parallel(config: MM1Config, world_size: int) -> Iterator[str]:
    vision, size = config.model.vision, config.parallel.tensor_model_parallel_size
    if config.parallel.vision_parallel_mode == "data" or vision.tower != "vit":
        return
    if vision.num_attention_heads % size:
        yield _not_split("vision.num_attention_heads", vision.num_attention_heads, size)
    if vision.ffn_hidden_size % size:
        yield _not_split("vision.ffn_hidden_size", vision.ffn_hidden_size, size)


def _connector(config: MM1Config, world_size: int) -> Iterator[str]:
    connector, patches = config.model.connector, num_patches(config.model.vision)
    tokens, kind = connector.tokens_per_image, connector.connector
    side, grid = math.isqrt(tokens), math.isqrt(patches)
    if kind in ("average_pool", "c_abstractor") and grid:
        if side**2 != tokens:
            yield f"tokens_per_image {tokens} is no square, and {kind} makes a square grid: use {_squares(side, grid)}"
        elif side > grid:
            yield f"tokens_per_image {tokens} is more than the tower's {patches} patches: use {patches} or fewer"
    if kind == "mlp" and grid and tokens != patches:
        yield f"tokens_per_image {tokens} is not the tower's {patches} patches, and mlp keeps them all: use {patches}"
    if kind == "attention_pool" and connector.hidden_size % connector.num_attention_heads:
        yield (
            f"connector.hidden_size {connector.hidden_size} is not divisible by connector.num_attention_heads "
            f"{connector.num_attention_heads}: change one of them"
        )
    if connector.options and "." not in kind:
        yield f"connector.options {connector.options} are for connectors of your own: {kind} takes none"


def _moe(config: MM1Config, world_size: int) -> Iterator[str]:
    moe, parallel = config.model.moe, config.parallel
    expert_parallel = parallel.expert_model_parallel_size
    if moe is None:
        if expert_parallel > 1:
            yield f"expert_model_parallel_size {expert_parallel} needs experts: set model.moe, or use 1"
        return
    if num_moe_blocks(config.model) == 0:
        blocks = config.model.decoder.num_layers
        yield f"moe_layer_freq {moe.moe_layer_freq} leaves none of the {blocks} blocks experts: use {blocks} or less"
    if moe.moe_router_topk > moe.num_moe_experts:
        yield f"moe_router_topk {moe.moe_router_topk} is more than num_moe_experts {moe.num_moe_experts}: use fewer"
    if moe.num_moe_experts % expert_parallel:
        yield _not_split("num_moe_experts", moe.num_moe_experts, expert_parallel, by="expert_model_parallel_size")
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if getattr(moe, name) < 0:
            yield f"{name} {getattr(moe, name)} is negative: use 0 or more"
    # megatron-core refuses to train experts under tensor parallelism without it.
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            f"experts with tensor_model_parallel_size {parallel.tensor_model_parallel_size} need sequence parallelism: "
            f"set parallel.sequence_parallel true, or tensor_model_parallel_size 1"
        )


def _processes(config: MM1Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        yield (
            f"{world_size} processes cannot be split into tensor_model_parallel_size {tensor} x "
            f"pipeline_model_parallel_size {pipeline}: start a multiple of {tensor * pipeline}, or choose smaller sizes"
        )
        return
    # Experts are spread over all processes of a pipeline stage, tensor-parallel ones included.
    stage = world_size // pipeline
    if config.model.moe is not None and stage % parallel.expert_model_parallel_size:
        yield (
            f"a pipeline stage's {stage} processes are not divisible by expert_model_parallel_size "
            f"{parallel.expert_model_parallel_size}: use {_divisors(stage)}"
        )
    data_parallel = stage // tensor
    unit = training.micro_batch_size * data_parallel
    if training.global_batch_size % unit:
        above = -(-training.global_batch_size // unit) * unit
        below = above - unit
        yield (
            f"global_batch_size {training.global_batch_size} is not divisible by micro_batch_size "
            f"{training.micro_batch_size} x data-parallel size {data_parallel} = {unit}: "
            f"use {f'{below} or ' if below else ''}{above}"
        )


def _sequence_parallel(config: MM1Config, world_size: int) -> Iterator[str]:
    size = config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel:
        return
    if size == 1:
        yield "sequence_parallel needs tensor_model_parallel_size above 1, which is 1: set it false, or raise the size"
    positions = config.data.seq_length * config.training.micro_batch_size
    if positions % size:
        step = size // math.gcd(size, config.training.micro_batch_size)
        above = -(-config.data.seq_length // step) * step
        yield (
            f"seq_length {config.data.seq_length} x micro_batch_size {config.training.micro_batch_size} is not "
            f"divisible by tensor_model_parallel_size {size}, as sequence_parallel needs: use seq_length {above}"
        )


def _pipeline(config: MM1Config, world_size: int) -> Iterator[str]:
    stages, first = config.parallel.pipeline_model_parallel_size, config.parallel.decoder_first_pipeline_num_layers
    blocks = config.model.decoder.num_layers
    if stages > blocks:
        yield (
            f"pipeline_model_parallel_size {stages} is more than the decoder's {blocks} blocks, "
            f"and each stage holds at least one: use {blocks} or less"
        )
    if first is None:
        return
    if stages == 1:
        yield f"decoder_first_pipeline_num_layers {first} needs more than one pipeline stage: leave it null"
    elif stages <= blocks and not 1 <= first <= blocks - stages + 1:
        yield (
            f"decoder_first_pipeline_num_layers {first} does not leave each of {stages} stages one of {blocks} blocks: "
            f"use 1 to {blocks - stages + 1}"
        )


def _sequence(config: MM1Config, world_size: int) -> Iterator[str]:
    data, tokens = config.data, config.model.connector.tokens_per_image
    needed = data.max_images_per_sequence * tokens + 2
    if needed > data.seq_length:
        fitting = (data.seq_length - 2) // tokens
        yield (
            f"max_images_per_sequence {data.max_images_per_sequence} x tokens_per_image {tokens} + 2 = {needed} "
            f"positions do not fit seq_length {data.seq_length}: use seq_length {needed} or more, "
            f"or {fitting} images or fewer"
        )


def _sources(config: MM1Config, world_size: int) -> Iterator[str]:
    def duplicates(key: str, sources: tuple[SourceConfig, ...]) -> Iterator[str]:
        names = [source.name for source in sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{key} has {names.count(name)} sources named {name!r}, and losses go by name: give each its own"

    yield from duplicates("data.sources", config.data.sources)
    yield from duplicates("data.validation", config.data.validation)
    weights = {source.name: source.weight for source in config.data.sources}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            yield f"the weight {weight} of source {name!r} is not a share: use 0 or more"
    if weights and not any(weights.values()):
        yield f"the weights of data.sources ({', '.join(weights)}) are all 0: give one of them more"


def _optimizer(config: MM1Config, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if not 0 < optimizer.lr < math.inf:
        yield f"optimizer.lr {optimizer.lr} is no rate: use a positive number"
    if not 0 <= optimizer.min_lr_ratio <= 1:
        yield f"optimizer.min_lr_ratio {optimizer.min_lr_ratio} is a share of the peak: use 0 to 1"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name} {getattr(optimizer, name)} is out of range: use 0 or more and less than 1"
    if not optimizer.adam_eps > 0:
        yield f"optimizer.adam_eps {optimizer.adam_eps} is too small: use a positive number"


def _schedule(config: MM1Config, world_size: int) -> Iterator[str]:
    warmup, decay = config.optimizer.lr_warmup_iters, config.optimizer.lr_decay_iters
    length, name = (config.training.train_iters, "train_iters") if decay is None else (decay, "lr_decay_iters")
    if warmup >= length:
        yield f"lr_warmup_iters {warmup} is not less than {name} {length}, warm-up included: use {length - 1} or less"


def _checkpoint(config: MM1Config, world_size: int) -> Iterator[str]:
    if config.checkpoint.finetune and config.checkpoint.load is None:
        yield "checkpoint.finetune takes the weights of checkpoint.load, which is null: name a checkpoint"


RULES = (
    Rule(("model.decoder",), _decoder_shape),
    Rule(("model.decoder", "parallel.tensor"), _decoder_tensor_parallel),
    Rule(("model.vision",), _vision_shape),
    Rule(("model.vision", "parallel.tensor"), _vision_tensor_parallel),
    Rule(("model.vision", "model.connector"), _connector),
    Rule(("model.moe", "model.decoder.num_layers", "parallel.tensor", "parallel.expert"), _moe),
    Rule(("parallel", "training.micro", "training.global"), _processes),
    Rule(("parallel.tensor", "data.seq_length", "training.micro"), _sequence_parallel),
    Rule(("parallel.pipeline", "model.decoder.num_layers"), _pipeline),
    Rule(("data.seq_length", "data.max_images", "model.connector.tokens"), _sequence),
    Rule((), _sources),
    Rule((), _optimizer),
    Rule(("optimizer.lr_", "training.train_iters"), _schedule),
    Rule((), _checkpoint),
)


def _not_split(name: str, value: int, size: int, *, by: str = "tensor_model_parallel_size") -> str:
    return f"{name} {value} is not divisible by {by} {size}: use {_divisors(value)}"


def _divisors(number: int) -> str:
    return _either([size for size in range(1, number + 1) if number % size == 0][:12])


def _squares(side: int, grid: int) -> str:
    return _either(sorted({min(number, grid) ** 2 for number in (side, side + 1)}))


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
