"""Which matrix products may run in FP8 on Hopper, and what a configuration must change where one may not.

The rules are those of Transformer Engine 2.20:

- `assert_dim_for_fp8_exec` (pytorch/utils.py), which Linear and LayerNormLinear call on input and weight: rows are a
  multiple of 8 and the last dimension one of 16. It sees a sequence-parallel input before that is gathered.
- `CanonicalizeGemmInput` (common/gemm/cublaslt_gemm.cu): on Hopper every FP8 product is computed with both operands
  contiguous along the summed dimension, which must be a multiple of 16. That is K forward, N for the input gradient and
  M for the weight gradient, so all three. One scale per 128 values asks for multiples of 8 beside it, and no more:
  blocks at the edge may be partial (`Float8BlockQuantizer.get_scale_shape`), in activations and in FP8 parameters
  (`_cast_master_weights_to_fp8_blockwise_scaling`, pytorch/tensor/utils.py).
- `GroupedLinear` has no check of its own; its experts' rows are padded (`planning.gemms.EXPERT_ROW_MULTIPLE`).
- `_start_all_gather_fp8_blockwise` (pytorch/distributed.py) gathers blockwise values only where a rank's rows and the
  last dimension are multiples of 128 (`Float8BlockQuantizer.is_quantizable`). It does not fail otherwise: it gathers in
  bf16, twice the bytes and not overlapped with anything, and quantises after that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Literal

from megatron_mm1.config.derived import fp8_recipes, uses_fp8
from megatron_mm1.config.layout_rules import either
from megatron_mm1.config.schema import MM1Config
from megatron_mm1.errors import ConfigError
from megatron_mm1.planning.gemms import Component, Gemm, positions_per_rank, rank_gemms, sequence_shards

CONTIGUOUS_MULTIPLE = 16
LOCAL_ROW_MULTIPLE = 8
BLOCK_LENGTH = 128

SIZE_KEYS: dict[Component, str] = {
    "tower": "tensor_model_parallel_size",
    "decoder": "tensor_model_parallel_size",
    "experts": "expert_tensor_parallel_size",
}
"""What splits the weights of each component; the connector's are whole."""


@dataclass(frozen=True)
class Verdict:
    """Whether a product runs as its recipe says.

    Attributes:
        kind: "legal" in FP8 as it is, "padded" in FP8 with rows added, "bf16" not in FP8, "illegal" fails at run time.
        note: why it is in bf16 or illegal, or what makes it slow.
    """

    kind: Literal["legal", "padded", "bf16", "illegal"]
    note: str = ""


def assess(gemm: Gemm) -> Verdict:
    if gemm.recipe == "bf16":
        return Verdict("bf16", gemm.why_bf16)
    if broken := _broken_row_rules(gemm) + _broken_width_rules(gemm):
        return Verdict("illegal", ", ".join(broken))
    note = "" if _gathers_in_fp8(gemm) else f"{gemm.m / gemm.row_shards:g} rows a rank: gathered in bf16"
    return Verdict("padded" if gemm.padded_m > gemm.m else "legal", note)


def fp8_share(gemms: Sequence[Gemm]) -> float:
    """Share of the FLOPs of `gemms` that are in FP8."""
    return sum(gemm.flops for gemm in gemms if gemm.recipe != "bf16") / sum(gemm.flops for gemm in gemms)


def check_fp8_shapes(config: MM1Config) -> None:
    """Refuses a configuration with a product that FP8 cannot run.

    Raises:
        ConfigError: every problem of `fp8_problems`.
    """
    if problems := fp8_problems(config):
        raise ConfigError(problems)


def fp8_problems(config: MM1Config) -> list[str]:
    """What FP8 cannot run, each with its numbers and the fix.

    Args:
        config: one that `validate` passes.
    """
    if not uses_fp8(config.fp8):
        return []
    components: tuple[Component, ...] = ("tower", "connector", "decoder", "experts")
    problems = []
    if any(_broken_row_rules(gemm) for gemm in _in_fp8(config, "decoder")):
        problems.append(_row_problem(config))
    for component in components:
        if broken := [gemm for gemm in _in_fp8(config, component) if _broken_width_rules(gemm)]:
            problems.append(_width_problem(config, component, broken))
    return problems


def _in_fp8(config: MM1Config, component: Component) -> list[Gemm]:
    return [gemm for gemm in rank_gemms(config) if gemm.component == component and gemm.recipe != "bf16"]


def _broken_row_rules(gemm: Gemm) -> list[str]:
    if gemm.component == "experts":  # padded at run time, by as many rows as it takes
        return []
    broken = []
    if gemm.padded_m % CONTIGUOUS_MULTIPLE:
        broken.append(f"M is no multiple of {CONTIGUOUS_MULTIPLE}")
    if gemm.gathered == "input" and gemm.padded_m % (gemm.row_shards * LOCAL_ROW_MULTIPLE):
        broken.append(f"M / {gemm.row_shards} is no multiple of {LOCAL_ROW_MULTIPLE}")
    return broken


def _broken_width_rules(gemm: Gemm) -> list[str]:
    sizes = {"N": gemm.n, "K": gemm.k}
    return [f"{name} is no multiple of {CONTIGUOUS_MULTIPLE}" for name in sizes if sizes[name] % CONTIGUOUS_MULTIPLE]


def _gathers_in_fp8(gemm: Gemm) -> bool:
    if gemm.row_shards == 1 or gemm.recipe != "fp8_blockwise":
        return True
    last = gemm.k if gemm.gathered == "input" else gemm.n
    return gemm.m % (gemm.row_shards * BLOCK_LENGTH) == 0 and last % BLOCK_LENGTH == 0


def _row_problem(config: MM1Config) -> str:
    """The decoder's: the rows of the other components are padded."""
    data, rows, shards = config.data, config.training.micro_batch_size, sequence_shards(config)
    context = config.parallel.context_parallel_size
    multiple = lcm(CONTIGUOUS_MULTIPLE, shards * LOCAL_ROW_MULTIPLE)
    step = context * multiple // gcd(context * multiple, rows)
    fitting = -(-data.seq_length // step) * step
    each = f" (a multiple of {LOCAL_ROW_MULTIPLE} on each of {shards} sequence-parallel ranks)" if shards > 1 else ""
    return (
        f"fp8.decoder_recipe {config.fp8.decoder_recipe} multiplies {positions_per_rank(config)} positions on a rank "
        f"(seq_length {data.seq_length} x micro_batch_size {rows} / context_parallel_size {context}), which must be a "
        f"multiple of {multiple}{each}: use data.seq_length {fitting}, or fp8.decoder_recipe bf16"
    )


def _width_problem(config: MM1Config, component: Component, broken: Sequence[Gemm]) -> str:
    recipe, instead = fp8_recipes(config.fp8)[component], f"fp8.{component}_recipe bf16"
    fitting = _fitting_sizes(config, component)
    fix = f"use {SIZE_KEYS[component]} {either(fitting)}, or" if fitting else "change the widths, or use"
    weights = dict.fromkeys(f"{gemm.name} [{gemm.n}, {gemm.k}]" for gemm in broken)  # once each
    return (
        f"fp8.{component}_recipe {recipe} needs weights whose two sizes on a rank are multiples of "
        f"{CONTIGUOUS_MULTIPLE}, and those of {component} are {', '.join(weights)}: {fix} {instead}"
    )


def _fitting_sizes(config: MM1Config, component: Component) -> list[int]:
    """Smaller sizes of what splits a component's weights at which all of them are legal."""
    if component not in SIZE_KEYS:
        return []
    key = SIZE_KEYS[component]
    present: int = getattr(config.parallel, key)

    def fits(size: int) -> bool:
        parallel = replace(config.parallel, **{key: size})  # type: ignore[arg-type]
        return not any(map(_broken_width_rules, _in_fp8(replace(config, parallel=parallel), component)))

    return [size for size in range(1, present) if present % size == 0 and fits(size)]
