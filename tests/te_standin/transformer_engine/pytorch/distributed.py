"""Activation recomputation, and the random number generators that it restores."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from transformer_engine.pytorch.quantization import autocast, innermost


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """torch's checkpoint, whose second forward pass is in the recipe of the first."""
    if distribute_saved_activations:
        raise NotImplementedError("the stand-in does not distribute saved activations")
    region = innermost()

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        again = autocast(
            enabled=region.recipe is not None, recipe=region.recipe, amax_reduction_group=region.amax_group
        )
        return nullcontext(), again

    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """Around megatron-core's own recomputation: it saves and restores scales, of which there are none."""
    return nullcontext()


class CudaRNGStatesTracker:
    """The base of megatron-core's tracker for this library; megatron_mm1 uses the one that needs no CUDA graphs."""

    def __init__(self) -> None:
        raise NotImplementedError("the stand-in has no tracker of CUDA generators")


def get_all_rng_states() -> dict[str, Any]:
    return {}
