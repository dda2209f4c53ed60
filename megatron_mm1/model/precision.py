"""FP8 in megatron-core's terms: how the linear layers of a component multiply, and where that holds.

megatron-core opens the context of a recipe around each layer of a stack (or around the whole stack, for scales that
are taken from earlier steps), by the stack's configuration. Experts and the connector, which may differ from the layers
around them, open their own.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from megatron.core.transformer import TransformerConfig

from megatron_mm1.config.derived import row_multiple
from megatron_mm1.config.schema import Fp8Recipe

_SETTINGS: dict[Fp8Recipe, dict[str, Any]] = {
    "bf16": {},
    # Gradients need the range of e5m2 where one scale is for a whole tensor; not where one is for 128 values.
    "fp8_delayed": dict(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=1024, fp8_amax_compute_algo="max"),
    "fp8_tensorwise": dict(fp8="hybrid", fp8_recipe="tensorwise"),
    "fp8_blockwise": dict(fp8="e4m3", fp8_recipe="blockwise"),
}


def fp8_settings(recipe: Fp8Recipe) -> dict[str, Any]:
    """A recipe as arguments of TransformerConfig."""
    return dict(_SETTINGS[recipe])


def with_recipe(config: TransformerConfig, recipe: Fp8Recipe) -> TransformerConfig:
    """A copy of a stack's configuration for modules in it that multiply by another recipe."""
    changed = copy.copy(config)  # not dataclasses.replace: __post_init__ is for the arguments that a user gives
    for name, value in {"fp8": None, **_SETTINGS[recipe]}.items():
        setattr(changed, name, value)
    if recipe == "fp8_delayed":
        changed.first_last_layers_bf16 = False  # of the stack around; megatron-core refuses the two together
    return changed


def delayed_recipe(config: TransformerConfig) -> Any:
    """Transformer Engine's recipe object of "fp8_delayed", as megatron-core makes it."""
    return get_fp8_recipe(with_recipe(config, "fp8_delayed"))


def input_row_multiple(config: TransformerConfig) -> int:
    """What the rows of a linear layer's input are to be a multiple of."""
    by_recipe = {settings.get("fp8_recipe"): recipe for recipe, settings in _SETTINGS.items()}
    return row_multiple(by_recipe[str(config.fp8_recipe)]) if config.fp8 else 1


def multiplying(config: TransformerConfig, *, layer: int = -1) -> AbstractContextManager[Any]:
    """Transformer Engine's linear layers in this context multiply by the recipe of `config`, bf16 where it has none,
    whatever holds around it.

    Args:
        layer: number of the layer in its stack, from 0, which may be excepted; -1: none is.
    """
    if config.fp8:
        context: AbstractContextManager[Any] = get_fp8_context(config, layer)
        return context
    from transformer_engine.pytorch import autocast

    without: AbstractContextManager[Any] = autocast(enabled=False)
    return without


def making_weights(config: TransformerConfig) -> AbstractContextManager[Any]:
    """Weights of modules in a stack whose weights are kept in FP8 (`fp8_param`) are not, if `config` has no recipe."""
    if config.fp8 or not config.fp8_param:
        return nullcontext()
    from transformer_engine.pytorch import quantized_model_init

    context: AbstractContextManager[Any] = quantized_model_init(enabled=False)
    return context
