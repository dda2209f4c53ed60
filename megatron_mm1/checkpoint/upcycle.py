"""Sparse upcycling: a dense MM1 becomes one with experts that computes the same (Komatsuzaki et al. 2022)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_mm1.checkpoint.model_check import model_problems
from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorInfo, TensorSource, copied
from megatron_mm1.config import ModelConfig, MoEConfig
from megatron_mm1.config.derived import COMPONENTS, expert_ffn_size, is_moe_block
from megatron_mm1.errors import ConfigError, UserError


@dataclass(frozen=True)
class _FeedForward:
    """The tensors of a dense block's feed-forward layer, by name."""

    norm: str
    fc1: str
    fc2: str

    @classmethod
    def of(cls, block: int) -> "_FeedForward":
        layer = _layer(block)
        return cls(
            f"{layer}mlp.linear_fc1.layer_norm_weight", f"{layer}mlp.linear_fc1.weight", f"{layer}mlp.linear_fc2.weight"
        )


def upcycle(model: ModelConfig, moe: MoEConfig, source: TensorSource, *, seed: int) -> tuple[ModelConfig, Plan]:
    """Experts in place of the feed-forward layers of a dense model, whose function stays the same.

    Every expert is a copy of the feed-forward layer it replaces; routers are drawn at random. The weights of a token's
    experts add up to 1, so the first loss is the dense model's to rounding, unless `moe_expert_capacity_factor` drops
    tokens. Where experts are narrower than the feed-forward layer, by a whole number G, each has one of G slices of
    it; routers then give the G experts that make up a copy the same score, so that a token goes to all of them or
    none (virtual groups, He et al. 2024).

    Only weights are taken over: a dense model's optimizer state says nothing about experts and routers.

    Args:
        model: of `source`, without experts.
        moe: the experts it gets.
        source: the dense model's tensors by their names in a checkpoint; others than the model's are left.
        seed: of the routers. A block's router depends on the seed and the block alone.

    Returns:
        The new model and its tensors, of the dtypes of those they replace.

    Raises:
        ConfigError: there can be no such model, or it would not compute what the dense one does; every reason is given.
        UserError: tensors of the dense feed-forward layers are missing or have another shape.
    """
    upcycled = replace(model, moe=moe)
    if problems := [*_problems(model, moe), *model_problems(upcycled)]:
        raise ConfigError(problems)
    blocks = [block for block in range(model.decoder.num_layers) if is_moe_block(upcycled, block)]
    _check_tensors(model, blocks, source)

    replaced = {_FeedForward.of(block).norm: block for block in blocks}
    dropped = {name for block in blocks for name in (_FeedForward.of(block).fc1, _FeedForward.of(block).fc2)}
    plan: Plan = []
    for name in source.tensors:
        if name in replaced:
            plan += _experts_layer(upcycled, replaced[name], source, seed=seed)
        elif name.startswith(tuple(COMPONENTS.values())) and name not in dropped:
            plan.append(copied(source, name))
    return upcycled, plan


def _layer(block: int) -> str:
    return f"language_model.decoder.layers.{2 * block + 1}."


def _problems(model: ModelConfig, moe: MoEConfig) -> Iterator[str]:
    if model.moe is not None:
        yield f"the model has {model.moe.num_moe_experts} experts already: upcycle a dense one"
    if moe.moe_router_topk == 1:
        # megatron-core refuses a softmax over one score, which has no gradient, and leaves a sigmoid's as it is.
        yield (
            "moe_router_topk 1 weighs a token's only expert by a score below 1, and the model would not compute what "
            "the dense one does: use 2 or more, whose weights add up to 1"
        )
    if moe.moe_router_pre_softmax:
        yield (
            "moe_router_pre_softmax weighs a token's experts by less than 1 in all, and the model would not compute "
            "what the dense one does: leave it off"
        )
    ffn, width = model.decoder.ffn_hidden_size, moe.moe_ffn_hidden_size
    if width is None or width < 1:
        return
    if ffn % width:
        yield (
            f"moe_ffn_hidden_size {width} does not divide the dense model's ffn_hidden_size {ffn}, and experts are "
            f"copies or equal slices of its layers: use {ffn}, or a divisor of it"
        )
        return
    slices = ffn // width
    for name in ("num_moe_experts", "moe_router_topk"):
        if getattr(moe, name) % slices:
            yield (
                f"moe_ffn_hidden_size {width} cuts each copy of a feed-forward layer {ffn} wide into {slices} experts, "
                f"and {name} {getattr(moe, name)} is no multiple of that: use {slices}, {2 * slices}, .."
            )


def _check_tensors(model: ModelConfig, blocks: list[int], source: TensorSource) -> None:
    hidden, ffn = model.decoder.hidden_size, model.decoder.ffn_hidden_size
    faults = []
    for block in blocks:
        names = _FeedForward.of(block)
        for name, shape in ((names.norm, (hidden,)), (names.fc1, (2 * ffn, hidden)), (names.fc2, (hidden, ffn))):
            info = source.tensors.get(name)
            if info is None:
                faults.append(f"{name} is missing")
            elif info.shape != shape:
                faults.append(f"{name} has shape {info.shape}, the configuration makes it {shape}")
    if faults:
        raise UserError("these weights are not the dense model described by the configuration: " + "; ".join(faults))


def _experts_layer(model: ModelConfig, block: int, source: TensorSource, *, seed: int) -> Plan:
    """The tensors of a block's experts, router and norm."""
    assert model.moe is not None
    moe, hidden, width = model.moe, model.decoder.hidden_size, expert_ffn_size(model)
    slices = model.decoder.ffn_hidden_size // width
    names, layer = _FeedForward.of(block), _layer(block)
    dtype = source.tensors[names.fc1].dtype
    experts = f"{layer}mlp.experts.experts"

    def stacked(name: str, theirs: str, shape: tuple[int, int], read: Callable[..., Tensor]) -> PlannedTensor:
        pieces = tuple(
            Piece(1, partial(read, source, theirs, slice_=expert % slices, slices=slices))
            for expert in range(moe.num_moe_experts)
        )
        return PlannedTensor(
            name, TensorInfo((moe.num_moe_experts, *shape), source.tensors[theirs].dtype), (theirs,), pieces
        )

    def router() -> Tensor:
        drawn = _router(
            moe.num_moe_experts // slices, hidden, std=model.decoder.init_method_std, seed=seed, block=block
        )
        return drawn.repeat_interleave(slices, dim=0).to(dtype)

    plan = [
        copied(source, names.norm, to=f"{layer}pre_mlp_layernorm.weight"),
        _made(
            f"{layer}mlp.router.weight", TensorInfo((moe.num_moe_experts, hidden), dtype), f"drawn, seed {seed}", router
        ),
    ]
    if moe.moe_router_enable_expert_bias:
        info = TensorInfo((moe.num_moe_experts,), torch.float32)
        plan.append(_made(f"{layer}mlp.router.expert_bias", info, "zeros", partial(torch.zeros, info.shape)))
    return [
        *plan,
        stacked(f"{experts}.linear_fc1.weight", names.fc1, (2 * width, hidden), _fc1_slice),
        stacked(f"{experts}.linear_fc2.weight", names.fc2, (hidden, width), _fc2_slice),
    ]


def _made(name: str, info: TensorInfo, how: str, make: Callable[[], Tensor]) -> PlannedTensor:
    return PlannedTensor(name, info, (how,), (Piece(info.shape[0], make),))


def _fc1_slice(source: TensorSource, name: str, *, slice_: int, slices: int) -> Tensor:
    """[1, 2 width, hidden] of [gate; up]: some of the gates and the same of what they gate."""
    if slices == 1:
        return source.read(name)[None]
    ffn = source.tensors[name].shape[0] // 2
    start, width = slice_ * ffn // slices, ffn // slices
    parts = [source.read(name, slice(first, first + width)) for first in (start, ffn + start)]
    return torch.cat(parts)[None]


def _fc2_slice(source: TensorSource, name: str, *, slice_: int, slices: int) -> Tensor:
    """[1, hidden, width], times the number of slices: a copy's slices share its weight, and their sum is wanted."""
    weight = source.read(name)
    if slices == 1:
        return weight[None]
    width = weight.shape[1] // slices
    return (weight[:, slice_ * width : (slice_ + 1) * width] * slices).contiguous()[None]


def _router(rows: int, hidden: int, *, std: float, seed: int, block: int) -> Tensor:
    """[rows, hidden] float32 from a normal distribution, as megatron-core draws routers."""
    mixed = int(np.random.SeedSequence([seed % 2**64, block]).generate_state(1)[0])
    return torch.empty(rows, hidden).normal_(std=std, generator=torch.Generator().manual_seed(mixed))
