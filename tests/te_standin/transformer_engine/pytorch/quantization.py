"""Which recipe is in force: autocast around forward passes, model_init around construction."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from transformer_engine._release import bind, functions, released
from transformer_engine.common.recipe import DelayedScaling, Recipe

_PATH = "pytorch/quantization.py"

(get_align_size_for_quantization,) = functions(_PATH, "get_align_size_for_quantization")


@dataclass(frozen=True)
class Autocast:
    """The innermost autocast region: its recipe, None where it is in high precision, and the group whose ranks agree on
    delayed scaling's amax. As in Transformer Engine, a group of None is the whole world."""

    recipe: Recipe | None = None
    amax_group: ProcessGroup | None = None


@dataclass
class _State:
    autocasts: list[Autocast] = field(default_factory=lambda: [Autocast()])
    initialisations: list[Recipe | None] = field(default_factory=lambda: [None])


_state = _State()


def innermost() -> Autocast:
    return _state.autocasts[-1]


def initialised_in() -> Recipe | None:
    """The recipe in which parameters are made now; None: in high precision."""
    return _state.initialisations[-1]


class DelayedScalingRecipeState:
    """A layer's scales and the largest values that they follow from; in the release, float32 on the GPU."""

    def __init__(self, recipe: DelayedScaling, *, num_quantizers: int) -> None:
        self.recipe = recipe
        self.scale = torch.ones(num_quantizers)
        self.amax_history = torch.zeros(recipe.amax_history_len, num_quantizers)

    def note(self, largest: Tensor) -> None:
        """Move the history on, and scale by the largest value in it."""
        self.amax_history.copy_(torch.roll(self.amax_history, -1, 0))
        self.amax_history[0] = largest
        top = self.amax_history.amax(0)
        self.scale.copy_(torch.where(top > 0, 448 / top, 1.0))


class FP8GlobalStateManager:
    """What megatron-core asks of it."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return innermost().recipe is not None

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return initialised_in() is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        return innermost().recipe or DelayedScaling()

    @classmethod
    def get_fp8_group(cls) -> ProcessGroup | None:
        return innermost().amax_group

    @classmethod
    def reset(cls) -> None:
        _state.__init__()  # type: ignore[misc]


class autocast:
    """A region whose layers compute in `recipe`, or in high precision where it is not enabled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        used = {"enabled", "recipe", "amax_reduction_group"}
        arguments = bind(_PATH, "autocast.__init__", (self, *args), kwargs, used)
        recipe = (arguments.recipe or DelayedScaling()) if arguments.enabled else None
        self.region = Autocast(recipe, arguments.amax_reduction_group)

    def __enter__(self) -> "autocast":
        _state.autocasts.append(self.region)
        return self

    def __exit__(self, *exception: object) -> None:
        _state.autocasts.pop()


@released(_PATH, "enabled", "fp8_recipe", "fp8_group")
def fp8_autocast(arguments: SimpleNamespace) -> autocast:
    return autocast(enabled=arguments.enabled, recipe=arguments.fp8_recipe, amax_reduction_group=arguments.fp8_group)


@contextmanager
def _parameters_in(recipe: Recipe | None) -> Iterator[None]:
    _state.initialisations.append(recipe)
    try:
        yield
    finally:
        _state.initialisations.pop()


@released(_PATH, "enabled", "recipe", "preserve_high_precision_init_val")
def quantized_model_init(arguments: SimpleNamespace) -> Any:
    return _parameters_in((arguments.recipe or DelayedScaling()) if arguments.enabled else None)


@released(_PATH, "enabled", "recipe", "preserve_high_precision_init_val")
def fp8_model_init(arguments: SimpleNamespace) -> Any:
    return quantized_model_init(**vars(arguments))
