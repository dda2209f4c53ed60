"""Whether a parallel layout fits the model, the batch and the number of processes: every problem with its fix."""

import math
from collections.abc import Iterator

from megatron_mm1.config.derived import block_pattern, expert_ffn_size, num_moe_blocks
from megatron_mm1.config.schema import MM1Config, TrainingConfig


def decoder_tensor_parallel(config: MM1Config, world_size: int) -> Iterator[str]:
    decoder, size = config.model.decoder, config.parallel.tensor_model_parallel_size
    if decoder.num_attention_heads % size:
        yield not_split("num_attention_heads", decoder.num_attention_heads, size)
    if decoder.num_query_groups is not None and decoder.num_query_groups % size:
        yield not_split("num_query_groups", decoder.num_query_groups, size)
    if decoder.ffn_hidden_size % size:
        yield not_split("ffn_hidden_size", decoder.ffn_hidden_size, size)


def vision_tensor_parallel(config: MM1Config, world_size: int) -> Iterator[str]:
    vision, size = config.model.vision, config.parallel.tensor_model_parallel_size
    if config.parallel.vision_parallel_mode == "data" or vision.tower != "vit":
        return
    if vision.num_attention_heads % size:
        yield not_split("vision.num_attention_heads", vision.num_attention_heads, size)
    if vision.ffn_hidden_size % size:
        yield not_split("vision.ffn_hidden_size", vision.ffn_hidden_size, size)


def moe(config: MM1Config, world_size: int) -> Iterator[str]:
    moe, parallel = config.model.moe, config.parallel
    expert_parallel, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if moe is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, name) > 1:
                yield f"{name} {getattr(parallel, name)} needs experts: set model.moe, or use 1"
        return
    if num_moe_blocks(config.model) == 0:
        blocks = config.model.decoder.num_layers
        yield f"moe_layer_freq {moe.moe_layer_freq} leaves none of the {blocks} blocks experts: use {blocks} or less"
    if moe.moe_router_topk > moe.num_moe_experts:
        yield f"moe_router_topk {moe.moe_router_topk} is more than num_moe_experts {moe.num_moe_experts}: use fewer"
    if moe.num_moe_experts % expert_parallel:
        yield not_split("num_moe_experts", moe.num_moe_experts, expert_parallel, by="expert_model_parallel_size")
    if expert_ffn_size(config.model) % expert_tensor:
        yield not_split(
            "an expert's width", expert_ffn_size(config.model), expert_tensor, by="expert_tensor_parallel_size"
        )
    # megatron-core refuses to train experts under tensor parallelism without it.
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            f"experts with tensor_model_parallel_size {parallel.tensor_model_parallel_size} need sequence parallelism: "
            f"set parallel.sequence_parallel true, or tensor_model_parallel_size 1"
        )


def processes(config: MM1Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
    }
    model_parallel = math.prod(sizes.values())
    if world_size % model_parallel:
        yield (
            f"{world_size} processes cannot be split into {_product(sizes)}: "
            f"start a multiple of {model_parallel}, or choose smaller sizes"
        )
        return
    # Experts are spread over all processes of a pipeline stage, tensor- and context-parallel ones included.
    stage = world_size // parallel.pipeline_model_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    if config.model.moe is not None and stage % experts:
        sizes = {"expert_model_parallel_size": parallel.expert_model_parallel_size}
        sizes |= {"expert_tensor_parallel_size": parallel.expert_tensor_parallel_size}
        yield f"a pipeline stage's {stage} processes are not divisible by {_product(sizes)}: use {divisors(stage)}"
    data_parallel = world_size // model_parallel
    unit = training.micro_batch_size * data_parallel
    for name, size in _batch_sizes(training).items():
        if size % unit:
            above = -(-size // unit) * unit
            below = above - unit
            yield (
                f"{name} {size} is not divisible by micro_batch_size {training.micro_batch_size} x data-parallel size "
                f"{data_parallel} = {unit}: use {f'{below} or ' if below else ''}{above}"
            )
        elif parallel.virtual_pipeline_model_parallel_size > 1:
            yield from _interleaved_microbatches(config, data_parallel, name=name, size=size)
    if parallel.virtual_pipeline_model_parallel_size > 1:
        yield from _interleaved_evaluation(config, data_parallel)


def _batch_sizes(training: TrainingConfig) -> dict[str, int]:
    """Every global batch size of a run, by its key."""
    ramp = {
        f"batch_size_ramp[{number}].global_batch_size": stage.global_batch_size
        for number, stage in enumerate(training.batch_size_ramp)
    }
    return {"global_batch_size": training.global_batch_size} | ramp


def _interleaved_microbatches(config: MM1Config, data_parallel: int, *, name: str, size: int) -> Iterator[str]:
    stages, training = config.parallel.pipeline_model_parallel_size, config.training
    count = size // (training.micro_batch_size * data_parallel)
    if count % stages:
        unit = training.micro_batch_size * data_parallel * stages
        yield (
            f"{count} microbatches per rank are not divisible by pipeline_model_parallel_size {stages}, as virtual "
            f"stages need: use a {name} that is a multiple of {unit}"
        )


def _interleaved_evaluation(config: MM1Config, data_parallel: int) -> Iterator[str]:
    stages, training = config.parallel.pipeline_model_parallel_size, config.training
    passes = -(-training.eval_iters // data_parallel)
    if training.eval_interval and passes % stages:
        yield (
            f"training.eval_iters {training.eval_iters} is {passes} microbatches per rank, not divisible by "
            f"pipeline_model_parallel_size {stages}, as virtual stages need: use {stages * data_parallel}, or a "
            "multiple of it"
        )


def sequence_split(config: MM1Config, world_size: int) -> Iterator[str]:
    """Positions of a microbatch over context-parallel ranks (two chunks each) and, of those, tensor-parallel ones."""
    parallel, rows, length = config.parallel, config.training.micro_batch_size, config.data.seq_length
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel and tensor == 1:
        yield "sequence_parallel needs tensor_model_parallel_size above 1, which is 1: set it false, or raise the size"
    chunks, why = 1, []
    if context > 1:
        chunks, why = 2 * context, [f"2 x context_parallel_size {context}"]
    if parallel.sequence_parallel and tensor > 1:
        chunks = math.lcm(chunks, context * tensor)
        why.append(f"tensor_model_parallel_size {tensor}, as sequence_parallel needs")
    if rows * length % chunks:
        step = chunks // math.gcd(chunks, rows)
        yield (
            f"seq_length {length} x micro_batch_size {rows} is not divisible by {' and '.join(why)}: "
            f"use seq_length {-(-length // step) * step}"
        )


def pipeline(config: MM1Config, world_size: int) -> Iterator[str]:
    parallel, blocks = config.parallel, config.model.decoder.num_layers
    ranks, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages, first = ranks * virtual, parallel.decoder_first_pipeline_num_layers
    if virtual > 1 and ranks == 1:
        yield (
            f"virtual_pipeline_model_parallel_size {virtual} needs more than one pipeline rank: use 1, or raise "
            "pipeline_model_parallel_size"
        )
        return
    if parallel.hybrid_layer_pattern is not None:
        yield from _layer_pattern(config, stages)
        return
    holding = stages - (first == 0)
    if holding > blocks:
        counted = f"pipeline_model_parallel_size {ranks}" + (f" x virtual stages {virtual}" if virtual > 1 else "")
        yield (
            f"{counted} is more than the decoder's {blocks} blocks, and each stage holds at least one: "
            f"use {blocks + (first == 0)} or less"
        )
    if first is None:
        return
    if stages == 1:
        yield f"decoder_first_pipeline_num_layers {first} needs more than one pipeline stage: leave it null"
    elif holding <= blocks and not 0 <= first <= blocks - stages + 1:
        yield (
            f"decoder_first_pipeline_num_layers {first} does not leave each of {stages} stages one of {blocks} blocks: "
            f"use 0 to {blocks - stages + 1}"
        )


def _layer_pattern(config: MM1Config, stages: int) -> Iterator[str]:
    pattern, model = config.parallel.hybrid_layer_pattern or "", block_pattern(config.model)
    if config.parallel.decoder_first_pipeline_num_layers is not None:
        yield "hybrid_layer_pattern says what decoder_first_pipeline_num_layers does: leave one of them null"
    if pattern.replace("|", "") != model:
        yield f"hybrid_layer_pattern {pattern!r} is not this decoder: put the boundaries | into {model!r}"
    segments = pattern.split("|")
    if len(segments) != stages:
        yield (
            f"hybrid_layer_pattern {pattern!r} has {len(segments)} stages, pipeline_model_parallel_size x "
            f"virtual_pipeline_model_parallel_size are {stages}: use {stages - 1} boundaries"
        )
    elif not all(segments[1:]):
        yield f"hybrid_layer_pattern {pattern!r} leaves a stage without layers: only the first may have none"


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def not_split(name: str, value: int, size: int, *, by: str = "tensor_model_parallel_size") -> str:
    return f"{name} {value} is not divisible by {by} {size}: use {divisors(value)}"


def divisors(number: int) -> str:
    return either([size for size in range(1, number + 1) if number % size == 0][:12])


def either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
