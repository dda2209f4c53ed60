"""The scales of layers that multiply by "fp8_delayed", in checkpoints, as plain tensors.

A scale follows from the largest values of the last 1024 steps, so a run that goes on without them computes something
else. Transformer Engine hands them out as a pickle (`get_extra_state`) and refuses to take one back, as loading it can
run code. Here a checkpoint has them in the object that megatron-core describes for that pickle: one per layer, one per
expert, the same for all tensor- and data-parallel ranks, which agree on the largest values. So they load in any layout.
Other recipes have no state, and save nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_mm1.config.derived import fp8_recipes
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.model.precision import delayed_recipe

_SUFFIX = "_extra_state"
_DIRECTIONS = ("fwd", "bwd")
_TENSORS = ("scale", "amax_history")
Scales = dict[str, Tensor]
"""Of one product: "scale_fwd" [3] (input, weight, output), "scale_bwd" [2] (gradients of output and input), and their
"amax_history_fwd" [steps, 3], "amax_history_bwd" [steps, 2], float32."""


def with_scales(stage: MM1Model, described: Mapping[str, Any]) -> dict[str, Any]:
    """megatron-core's description of a stage's state, with scales instead of Transformer Engine's pickles.

    Objects of layers that have no scales are left out.
    """
    kept = {name: entry for name, entry in described.items() if not _is_extra_state(name)}
    for name, layer in _layers(stage):
        for key, scales in zip(_keys(name, layer), _scales(layer), strict=False):
            kept[key] = replace(described[key], data=scales)
    return kept


def with_places(stage: MM1Model, described: Mapping[str, Any]) -> dict[str, Any]:
    """`described`, with the places that scales are read into: of every layer of a component that has this recipe."""
    kept = {name: entry for name, entry in described.items() if not _is_extra_state(name)}
    for name, layer in _delayed_layers(stage):
        kept |= {key: replace(described[key], data=None) for key in _keys(name, layer)}
    return kept


def restore_scales(stage: MM1Model, loaded: dict[str, Any]) -> frozenset[str]:
    """Take the scales out of a loaded state and into the stage's layers.

    It comes before the weights: those kept in FP8 are rounded by their scale as they are loaded.

    Returns:
        The components with this recipe none of whose layers found any: they start from empty histories.
    """
    wanted, found = set(), set()
    for name, layer in _delayed_layers(stage):
        wanted.add(_component(name))
        parts = [loaded.pop(key, None) for key in _keys(name, layer)]
        # What earlier versions saved there is no dict but the bytes of a pickle.
        if all(isinstance(part, dict) for part in parts):
            _set_scales(stage, layer, parts)
            found.add(_component(name))
    return frozenset(wanted - found)


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2].startswith(_SUFFIX)


def _layers(stage: MM1Model) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linear layers."""
    for name, module in stage.named_modules():
        if hasattr(module, "fp8_meta") and hasattr(module, "in_features"):
            yield name, module


def _delayed_layers(stage: MM1Model) -> Iterator[tuple[str, Any]]:
    recipes = fp8_recipes(stage.fp8)
    return ((name, layer) for name, layer in _layers(stage) if recipes[_component(name)] == "fp8_delayed")


def _component(name: str) -> str:
    if name.startswith("language_model."):
        return "experts" if ".experts." in name else "decoder"
    return name.partition(".")[0]


def _keys(name: str, layer: Any) -> list[str]:
    """megatron-core's names of a layer's extra states: one, or one per expert."""
    return [f"{name}.{_SUFFIX}{index or ''}" for index in range(getattr(layer, "num_gemms", 1))]


def _scales(layer: Any) -> list[Scales]:
    """Of each of a layer's products; none where it has not multiplied by this recipe."""
    states = {direction: layer.fp8_meta.get(f"scaling_{direction}") for direction in _DIRECTIONS}
    if not all(hasattr(state, "amax_history") for state in states.values()):
        return []
    count = getattr(layer, "num_gemms", 1)
    split = {
        f"{tensor}_{direction}": getattr(state, tensor).detach().cpu().unflatten(-1, (-1, count)).unbind(-1)
        for direction, state in states.items()
        for tensor in _TENSORS
    }
    return [{name: parts[index].clone() for name, parts in split.items()} for index in range(count)]


def _set_scales(stage: MM1Model, layer: Any, parts: list[Scales]) -> None:
    layer.fp8_meta["num_gemms"] = len(parts)
    layer.init_fp8_meta_tensors(delayed_recipe(stage.config))
    with torch.no_grad():
        for direction in _DIRECTIONS:
            state = layer.fp8_meta[f"scaling_{direction}"]
            for tensor in _TENSORS:
                whole = torch.stack([part[f"{tensor}_{direction}"] for part in parts], dim=-1).flatten(-2)
                getattr(state, tensor).copy_(whole)
