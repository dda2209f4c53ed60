"""Whether a configuration can run: every problem at once, with its numbers and the fix. No file or device is read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_mm1.config import layout_rules, lora_rules
from megatron_mm1.config.derived import (
    COMPONENTS,
    fp8_recipes,
    head_dim,
    num_patches,
    num_query_groups,
    num_vision_blocks,
    uses_fp8,
)
from megatron_mm1.config.keys import value_at
from megatron_mm1.config.layout_rules import divisors, either
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
    "model.lora.rank": 1,
    "model.moe.num_moe_experts": 1,
    "model.moe.moe_layer_freq": 1,
    "model.moe.moe_ffn_hidden_size": 1,
    "model.moe.moe_router_topk": 1,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_model_parallel_size": 1,
    "parallel.context_parallel_size": 1,
    "parallel.expert_model_parallel_size": 1,
    "parallel.expert_tensor_parallel_size": 1,
    "parallel.distributed_timeout_minutes": 1,
    "parallel.heartbeat_timeout_seconds": 0,
    "data.seq_length": 2,
    "data.max_images_per_sequence": 0,
    "data.packing_lookahead": 1,
    "data.min_image_tiles": 1,
    "data.max_image_tiles": 1,
    "data.num_workers": 0,
    "data.prefetch_factor": 1,
    "data.max_worker_restarts": 0,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 1,
    "training.train_iters": 1,
    "training.eval_interval": 0,
    "training.eval_iters": 1,
    "training.recompute_num_layers": 1,
    "fp8.bf16_blocks_at_start": 0,
    "fp8.bf16_blocks_at_end": 0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.lr_decay_iters": 1,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "optimizer.vision_lr": 0,
    "optimizer.connector_lr": 0,
    "training.output_z_loss_coeff": 0,
    "checkpoint.save_interval": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 1,
    "checkpoint.max_save_failures": 0,
    "faults.spike_window": 1,
    "faults.max_consecutive_skips": 0,
    "faults.rollback_steps": 1,
    "faults.max_rollbacks": 1,
    "faults.hang_timeout_seconds": 1,
    "faults.straggler_factor": 0,
    "evaluation.interval": 0,
    "evaluation.limit": 1,
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
    if decoder.rope_scaling_factor is not None and not decoder.rope_scaling_factor >= 1:
        yield f"decoder.rope_scaling_factor {decoder.rope_scaling_factor} is too small: use 1 or more, or null"
    if heads % groups:
        yield f"num_attention_heads {heads} is not divisible by num_query_groups {groups}: use {divisors(heads)}"


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


def _router(config: MM1Config, world_size: int) -> Iterator[str]:
    moe = config.model.moe
    if moe is None:
        return
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"):
        if getattr(moe, name) < 0:
            yield f"{name} {getattr(moe, name)} is negative: use 0 or more"
    if moe.moe_router_pre_softmax and moe.moe_router_score_function != "softmax":
        yield (
            f"moe_router_pre_softmax is about softmax scores, and moe_router_score_function is "
            f"{moe.moe_router_score_function}: turn it off, or use softmax"
        )
    if moe.moe_router_topk == 1 and moe.moe_router_score_function == "softmax" and not moe.moe_router_pre_softmax:
        yield (
            "moe_router_topk 1 without moe_router_pre_softmax gives every expert the weight 1 and the router no "
            "gradient: set moe_router_pre_softmax true, or moe_router_topk 2"
        )
    capacity = moe.moe_expert_capacity_factor
    if capacity is not None and not 0 < capacity < math.inf:
        yield f"moe_expert_capacity_factor {capacity} is no multiple of a share: use more than 0, or null"
    if moe.moe_router_enable_expert_bias and moe.moe_router_score_function != "sigmoid":
        yield (
            f"moe_router_enable_expert_bias needs moe_router_score_function sigmoid, which is "
            f"{moe.moe_router_score_function}: set that, or leave the bias off"
        )


def _freeze(config: MM1Config, world_size: int) -> Iterator[str]:
    training = config.training
    if set(training.freeze) == set(COMPONENTS):
        yield "training.freeze names every part, which leaves nothing to train: leave one out"
    if unknown := sorted(set(training.frozen_steps) - set(COMPONENTS)):
        yield f"training.frozen_steps names {', '.join(unknown)}: its parts are {', '.join(COMPONENTS)}"
    if wrong := {name: steps for name, steps in training.frozen_steps.items() if steps < 1}:
        yield f"training.frozen_steps {wrong} freezes nothing: use 1 or more, or leave the part out"
    if both := sorted(set(training.frozen_steps) & set(training.freeze)):
        yield f"training.frozen_steps and training.freeze both name {', '.join(both)}: leave it to one of them"
    elif training.frozen_steps and set(training.freeze) | set(training.frozen_steps) == set(COMPONENTS):
        least = min(training.frozen_steps.values())
        yield f"training.frozen_steps leaves nothing to train in the first {least} steps: leave a part out"
    if training.frozen_steps and config.parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_grad_reduce waits for the gradient of every parameter, and parts in "
            "training.frozen_steps have none at first: set it false, or leave frozen_steps empty"
        )


def _device_memory(config: MM1Config, world_size: int) -> Iterator[str]:
    memory = config.training.device_memory_gib
    if memory is not None and not 0 < memory < math.inf:
        yield f"training.device_memory_gib {memory} is no size: use more than 0, or null"


def _batch_size_ramp(config: MM1Config, world_size: int) -> Iterator[str]:
    ramp = config.training.batch_size_ramp
    ends = [stage.until for stage in ramp]
    if any(later <= earlier for earlier, later in pairwise([0, *ends])):
        yield f"the steps `until` of training.batch_size_ramp {ends} must be above 0 and increase: put them in order"
    if sizes := [stage.global_batch_size for stage in ramp if stage.global_batch_size < 1]:
        yield f"training.batch_size_ramp has batches of {sizes[0]} sequences: use 1 or more"


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


def _images(config: MM1Config, world_size: int) -> Iterator[str]:
    data = config.data
    if data.min_image_tiles > data.max_image_tiles:
        yield f"min_image_tiles {data.min_image_tiles} is more than max_image_tiles {data.max_image_tiles}: lower it"
    if data.tile_indicators and data.image_tiling == "none":
        yield "data.tile_indicators stand in front of tiles, and data.image_tiling none makes none: choose a tiling"
    most = {"none": 0, "overview_and_crops": 5, "dynamic": data.max_image_tiles + (data.max_image_tiles > 1)}
    if most[data.image_tiling] > data.max_images_per_sequence:
        yield (
            f"data.image_tiling {data.image_tiling} makes up to {most[data.image_tiling]} images of one, the whole "
            f"included, and max_images_per_sequence is {data.max_images_per_sequence}: raise it"
        )
    shares = data.random_resized_crop
    if shares is not None and not 0 < shares[0] <= shares[1] <= 1:
        yield f"data.random_resized_crop {list(shares)} is no range of shares of an area: use two of 0 to 1, in order"


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
    for source in config.data.sources:
        if source.max_epochs is not None and not source.max_epochs > 0:
            yield f"max_epochs {source.max_epochs} of source {source.name!r} is nothing to train on: use more than 0"


def _mixture(config: MM1Config, world_size: int) -> Iterator[str]:
    data = config.data
    names = {source.name for source in data.sources}
    steps = [phase.step for phase in data.curriculum]
    if any(later <= earlier for earlier, later in pairwise([0, *steps])):
        yield f"the steps of data.curriculum {steps} must be above 0 and increase: put the phases in order"
    for number, phase in enumerate(data.curriculum):
        if unknown := sorted(set(phase.weights) - names):
            yield (
                f"data.curriculum[{number}] gives weights to {', '.join(unknown)}, which data.sources "
                f"({', '.join(sorted(names))}) does not have: name its sources"
            )
        if not all(0 <= weight < math.inf for weight in phase.weights.values()) or not any(phase.weights.values()):
            yield f"the weights of data.curriculum[{number}] {phase.weights} are no shares: use 0 or more, not all 0"
    if data.packing == "mixed":
        if data.mixture_unit == "sequences":
            yield (
                'with data.packing "mixed" a sequence holds several sources, so weights cannot be shares of sequences: '
                'set data.mixture_unit to "tokens" or "examples"'
            )
        if capped := [source.name for source in data.sources if source.max_epochs is not None]:
            yield (
                f'max_epochs of {", ".join(capped)} needs data.packing "single_source": with "mixed" every source is '
                "seen in fixed proportion to the others"
            )


def _optimizer(config: MM1Config, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if not 0 < optimizer.lr < math.inf:
        yield f"optimizer.lr {optimizer.lr} is no rate: use a positive number"
    if not 0 <= optimizer.min_lr_ratio <= 1:
        yield f"optimizer.min_lr_ratio {optimizer.min_lr_ratio} is a share of the peak: use 0 to 1"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name} {getattr(optimizer, name)} is out of range: use 0 or more and less than 1"
    for name in ("adam_eps", "adafactor_eps", "adafactor_clip_threshold"):
        if not getattr(optimizer, name) > 0:
            yield f"optimizer.{name} {getattr(optimizer, name)} is too small: use a positive number"
    if not -1 <= optimizer.adafactor_decay_rate < 0:
        yield f"optimizer.adafactor_decay_rate {optimizer.adafactor_decay_rate} is out of range: use -1 to below 0"
    if optimizer.optimizer == "adafactor" and config.parallel.use_distributed_optimizer:
        yield (
            "optimizer.optimizer adafactor needs whole rows and columns of each matrix, and "
            "parallel.use_distributed_optimizer cuts matrices anywhere: set it false (AdaFactor's state is small), or "
            "use adamw"
        )


def _schedule(config: MM1Config, world_size: int) -> Iterator[str]:
    warmup, decay = config.optimizer.lr_warmup_iters, config.optimizer.lr_decay_iters
    length, name = (config.training.train_iters, "train_iters") if decay is None else (decay, "lr_decay_iters")
    if warmup >= length:
        yield f"lr_warmup_iters {warmup} is not less than {name} {length}, warm-up included: use {length - 1} or less"


def _fp8(config: MM1Config, world_size: int) -> Iterator[str]:
    fp8, training, recipes = config.fp8, config.training, fp8_recipes(config.fp8)
    in_bf16 = fp8.bf16_blocks_at_start + fp8.bf16_blocks_at_end
    if uses_fp8(fp8) and training.precision != "bf16":
        yield f"FP8 layers need training.precision bf16 beside them, which is {training.precision}: set bf16"
    if uses_fp8(fp8) and training.layer_backend == "local":
        yield "FP8 layers are Transformer Engine's, and training.layer_backend is local: use auto or transformer_engine"
    if config.model.moe is None and fp8.experts_recipe not in (None, "bf16"):
        yield f"fp8.experts_recipe {fp8.experts_recipe} needs experts: set model.moe, or leave it null"
    if recipes["decoder"] == "bf16" and fp8.fp8_param:
        yield "fp8.fp8_param is about the decoder's FP8 layers, and fp8.decoder_recipe is bf16: leave it false"
    if recipes["decoder"] == recipes["experts"] == "bf16":
        for name in ("bf16_blocks_at_start", "bf16_blocks_at_end"):
            if getattr(fp8, name):
                yield f"fp8.{name} {getattr(fp8, name)} excepts blocks from fp8.decoder_recipe, which is bf16: use 0"
    elif in_bf16 >= config.model.decoder.num_layers:
        yield (
            f"fp8.bf16_blocks_at_start + bf16_blocks_at_end {in_bf16} leave none of the decoder's "
            f"{config.model.decoder.num_layers} blocks in FP8: use fewer"
        )
    if in_bf16 and "fp8_delayed" in (recipes["decoder"], recipes["experts"]):
        # Its scales are reduced over ranks once for all layers of a stage, on leaving the last of them.
        yield "bf16_blocks_at_start and bf16_blocks_at_end go with every FP8 recipe but fp8_delayed: use another, or 0"
    if config.model.moe is not None and "fp8_delayed" == recipes["experts"] != recipes["decoder"]:
        yield (
            f"fp8.experts_recipe fp8_delayed within a decoder of {recipes['decoder']} would update its scales after "
            "every layer instead of every pass: set fp8.decoder_recipe fp8_delayed as well, or another for experts"
        )
    if fp8.fp8_param and recipes["experts"] not in ("bf16", recipes["decoder"]):
        yield (
            f"fp8.fp8_param keeps weights as fp8.decoder_recipe {recipes['decoder']} reads them, and "
            f"fp8.experts_recipe is {recipes['experts']}: use the same, or bf16"
        )
    stage = config.model.decoder.num_layers // config.parallel.pipeline_model_parallel_size
    if max(fp8.bf16_blocks_at_start, fp8.bf16_blocks_at_end) > stage > 0:
        yield (
            f"fp8.bf16_blocks_at_start {fp8.bf16_blocks_at_start} and bf16_blocks_at_end {fp8.bf16_blocks_at_end} may "
            f"be no more than an even share of the blocks for each pipeline rank, {stage}: use fewer"
        )
    if fp8.fp8_param and not config.parallel.use_distributed_optimizer:
        yield (
            "fp8.fp8_param needs the float32 weights that parallel.use_distributed_optimizer keeps: set that true, or "
            "fp8.fp8_param false"
        )


def _checkpoint(config: MM1Config, world_size: int) -> Iterator[str]:
    if config.checkpoint.finetune and config.checkpoint.load is None:
        yield "checkpoint.finetune takes the weights of checkpoint.load, which is null: name a checkpoint"


def _faults(config: MM1Config, world_size: int) -> Iterator[str]:
    faults, longest = config.faults, 60 * config.parallel.distributed_timeout_minutes - 5
    if not 1 < faults.spike_factor < math.inf:
        yield f"faults.spike_factor {faults.spike_factor} would make ordinary steps spikes: use more than 1"
    if not (faults.straggler_factor == 0 or 1 < faults.straggler_factor < math.inf):
        yield f"faults.straggler_factor {faults.straggler_factor} names ordinary ranks: use more than 1, or 0 for none"
    if faults.hang_timeout_seconds is not None and faults.hang_timeout_seconds > longest:
        yield (
            f"faults.hang_timeout_seconds {faults.hang_timeout_seconds} is more than {longest}, and collectives give "
            f"up after parallel.distributed_timeout_minutes {config.parallel.distributed_timeout_minutes}: raise that, "
            f"or use {longest} or less"
        )


def _evaluation(config: MM1Config, world_size: int) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.interval and not evaluation.tasks:
        yield f"evaluation.interval {evaluation.interval} without a task: name some in evaluation.tasks, or use 0"
    if evaluation.tasks and not evaluation.interval:
        yield f"evaluation.tasks {', '.join(evaluation.tasks)} without evaluation.interval: say how often"
    if not evaluation.shots or min(evaluation.shots) < 0:
        yield f"evaluation.shots {list(evaluation.shots)}: give numbers of demonstrations, 0 for none"
    for task in evaluation.data:
        if task not in evaluation.tasks:
            yield f"evaluation.data names {task}, which is not among evaluation.tasks: add it, or leave it out"


RULES = (
    Rule(("model.decoder",), _decoder_shape),
    Rule(("model.decoder", "parallel.tensor"), layout_rules.decoder_tensor_parallel),
    Rule(("model.vision",), _vision_shape),
    Rule(("model.vision", "parallel.tensor"), layout_rules.vision_tensor_parallel),
    Rule(("model.vision", "model.connector"), _connector),
    Rule(("model.moe", "model.decoder", "parallel.tensor", "parallel.expert"), layout_rules.moe),
    Rule(("model.moe",), _router),
    Rule(("parallel", "training"), layout_rules.processes),
    Rule(("parallel.tensor", "parallel.context", "data.seq_length", "training.micro"), layout_rules.sequence_split),
    Rule(("parallel.pipeline", "parallel.virtual", "model.decoder.num_layers"), layout_rules.pipeline),
    Rule((), _freeze),
    Rule((), lora_rules.lora),
    Rule((), _batch_size_ramp),
    Rule((), _device_memory),
    Rule(("data.seq_length", "data.max_images", "model.connector.tokens"), _sequence),
    Rule(("data.min_image", "data.max_image"), _images),
    Rule((), _sources),
    Rule((), _mixture),
    Rule((), _optimizer),
    Rule(("optimizer.lr_", "training.train_iters"), _schedule),
    Rule(("fp8", "model.decoder.num_layers", "parallel.pipeline"), _fp8),
    Rule((), _checkpoint),
    Rule(("faults", "parallel.distributed_timeout"), _faults),
    Rule(("evaluation",), _evaluation),
)


def _squares(side: int, grid: int) -> str:
    return either(sorted({min(number, grid) ** 2 for number in (side, side + 1)}))
