"""How much device memory a training step takes on each rank, from the configuration alone.

An estimate, of the moment a step needs most, meant to be a little high. Tensor-parallel, context-parallel and
data-parallel ranks at the same place in the pipeline take the same, so there is one figure per pipeline rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_mm1.config.derived import fp8_recipes, frozen_weights, padded_vocab_size
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.errors import ConfigError
from megatron_mm1.planning.activations import (
    FP32,
    element_size,
    logits,
    recomputed_at_once,
    stage_activations,
    vision_activations,
)
from megatron_mm1.planning.shards import RankParameters, rank_parameters, stage_layers

GIB = 2**30
FP8 = 1
WORKSPACE = GIB
"""Of cuBLAS, attention kernels and Transformer Engine, and what is lost between the allocator's blocks."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on a rank.

    Attributes:
        weights: in the training's precision, or FP8 (`fp8.fp8_param`).
        fp8_weights: FP8 copies of the weights of FP8 layers, as they are and transposed.
        gradients: float32, of what is trained.
        optimizer: its moments, and master weights beside bf16 ones; the rank's share with the distributed optimizer.
        activations: what microbatches whose backward pass is to come have left.
        logits: of the output layer, their softmax and its gradient.
        workspace: of kernels, and the gradient of the largest weight before it is added up.
    """

    weights: int
    fp8_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in parts if size)


def plan_memory(config: MM1Config, *, world_size: int) -> tuple[RankMemory, ...]:
    """What a rank takes, by pipeline rank.

    Args:
        config: one that `validate` passes for so many processes.

    Raises:
        UserError: tower or connector is none of the built-in ones, so that nothing can be said.
    """
    return tuple(
        _rank_memory(config, rank, world_size=world_size)
        for rank in range(config.parallel.pipeline_model_parallel_size)
    )


def memory_problem(config: MM1Config, plan: Sequence[RankMemory]) -> str | None:
    """What of a plan `training.device_memory_gib` does not hold, with ways out; None: nothing, or it is not set."""
    limit = config.training.device_memory_gib
    rank, memory = max(enumerate(plan), key=lambda one: one[1].total)
    if limit is None or memory.total <= limit * GIB:
        return None
    ways = ["raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size"]
    if not config.parallel.use_distributed_optimizer and config.optimizer.optimizer == "adamw":
        ways.append("set parallel.use_distributed_optimizer")
    if config.training.recompute_granularity != "full":
        ways.append("set training.recompute_granularity full")
    return (
        f"a rank at place {rank} of the pipeline is planned to take {memory.total / GIB:.2f} GiB ({memory}), and "
        f"training.device_memory_gib is {limit:g}: {', '.join(ways)}, or shorten data.seq_length"
    )


def check_memory(config: MM1Config, *, world_size: int) -> None:
    """Refuses a run that `training.device_memory_gib` does not hold, if that is set.

    Raises:
        ConfigError: as `memory_problem`.
        UserError: as `plan_memory`.
    """
    if config.training.device_memory_gib is None:
        return
    if problem := memory_problem(config, plan_memory(config, world_size=world_size)):
        raise ConfigError([problem])


def data_parallel_size(config: MM1Config, world_size: int) -> int:
    parallel = config.parallel
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return world_size // copy


def _rank_memory(config: MM1Config, rank: int, *, world_size: int) -> RankMemory:
    is_last = rank == config.parallel.pipeline_model_parallel_size - 1
    parameters = rank_parameters(config, rank)
    trained = _trained(config, parameters)
    in_fp8 = _in_fp8(config, parameters)
    in_size = parameters.total - (in_fp8 if config.fp8.fp8_param else 0)
    return RankMemory(
        weights=element_size(config) * in_size,
        fp8_weights=2 * FP8 * in_fp8,
        gradients=FP32 * trained.total,
        optimizer=_optimizer(config, trained, world_size=world_size),
        activations=_activations(config, rank, world_size=world_size),
        logits=logits(config) if is_last else 0,
        workspace=WORKSPACE + element_size(config) * _largest_weight(config),
    )


def _trained(config: MM1Config, parameters: RankParameters) -> RankParameters:
    """Without what is frozen throughout."""
    frozen = frozen_weights(config)
    return RankParameters(
        tower=0 if "tower" in frozen else parameters.tower,
        connector=0 if "connector" in frozen else parameters.connector,
        decoder=0 if "decoder" in frozen else parameters.decoder,
        experts=0 if "decoder" in frozen else parameters.experts,
        embedding=0 if "decoder" in frozen else parameters.embedding,
        tower_adapters=parameters.tower_adapters,
        decoder_adapters=parameters.decoder_adapters,
    )


def _in_fp8(config: MM1Config, parameters: RankParameters) -> int:
    """Parameters of linear layers that multiply in FP8; norms and routers, which are small, are counted in, and the
    few linear layers of the connector are not."""
    recipes = fp8_recipes(config.fp8)
    sizes = {"decoder": parameters.decoder, "experts": parameters.experts, "tower": parameters.tower}
    return sum(size for component, size in sizes.items() if recipes[component] != "bf16")


def _optimizer(config: MM1Config, trained: RankParameters, *, world_size: int) -> int:
    """AdamW has two moments of each parameter, AdaFactor a row and a column of each matrix, which are not counted."""
    parallel = config.parallel
    moments = 2 if config.optimizer.optimizer == "adamw" else 0
    each = FP32 * (moments + (config.training.precision == "bf16"))
    if not parallel.use_distributed_optimizer:
        return each * trained.total
    copies = data_parallel_size(config, world_size) * parallel.context_parallel_size
    split = parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size
    expert_copies = world_size // (parallel.pipeline_model_parallel_size * split)
    return each * trained.dense // copies + each * trained.experts // expert_copies


def _activations(config: MM1Config, rank: int, *, world_size: int) -> int:
    """Of all microbatches in flight at the fullest moment."""
    parallel, training = config.parallel, config.training
    microbatches = training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))
    ranks, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages = stage_layers(config, rank)
    each = [stage_activations(config, layers) for layers in stages]
    if virtual == 1:
        in_flight = min(microbatches, ranks - rank)
        of_images = in_flight
        kept = in_flight * each[0]
    else:  # the interleaved schedule's warm-up, in turns of as many microbatches as there are ranks, and one more
        in_flight = min(microbatches * virtual, 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1)
        turns = [each[number // ranks % virtual] for number in range(in_flight)]
        of_images = sum(number // ranks % virtual == 0 for number in range(in_flight))
        kept = sum(turns)
    images = of_images * vision_activations(config) if rank == 0 else 0
    return kept + images + max(recomputed_at_once(config, layers) for layers in stages)


def _largest_weight(config: MM1Config) -> int:
    decoder, size = config.model.decoder, config.parallel.tensor_model_parallel_size
    return decoder.hidden_size * max(2 * decoder.ffn_hidden_size, padded_vocab_size(decoder.vocab_size, size)) // size
