"""Adapters merged into the weights beside them: the same model without `model.lora`."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from megatron_mm1.checkpoint.tensors import Piece, Plan, PlannedTensor, TensorSource, copied
from megatron_mm1.config import ModelConfig
from megatron_mm1.config.derived import COMPONENTS, LORA_A, LORA_B, lora_scale


def merge_adapters(model: ModelConfig, source: TensorSource) -> tuple[ModelConfig, Plan]:
    """W + scale B A in the place of each W that has an adapter, added up in float32 and rounded to W's type once.

    Only weights are taken over: the optimizer's state is that of A and B.

    Args:
        model: of `source`; without `lora` nothing is changed.
        source: tensors by their names in a checkpoint; others than the model's are left. Parts may be missing.

    Returns:
        The model without adapters and its tensors.
    """
    weights = [name for name in source.tensors if name.startswith(tuple(COMPONENTS.values()))]
    if model.lora is None:
        return model, [copied(source, name) for name in weights]
    scale = lora_scale(model.lora)
    plan = []
    for name in weights:
        layer, _, tensor = name.rpartition(".")
        if tensor == "weight" and f"{layer}.{LORA_A}" in source.tensors:
            plan.append(_merged(source, layer, scale=scale))
        elif tensor not in (LORA_A, LORA_B):
            plan.append(copied(source, name))
    return replace(model, lora=None), plan


def _merged(source: TensorSource, layer: str, *, scale: float) -> PlannedTensor:
    names = (f"{layer}.weight", f"{layer}.{LORA_B}", f"{layer}.{LORA_A}")
    info = source.tensors[names[0]]
    return PlannedTensor(names[0], info, names, (Piece(info.shape[0], partial(_sum, source, names, scale=scale)),))


def _sum(source: TensorSource, names: tuple[str, str, str], *, scale: float) -> Tensor:
    weight, b, a = (source.read(name) for name in names)
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
