"""What low-rank adapters go with; yields as the rules of validation.py do."""

import math
from collections.abc import Iterator

from megatron_mm1.config.derived import COMPONENTS, fp8_recipes, lora_targets
from megatron_mm1.config.schema import MM1Config


def lora(config: MM1Config, world_size: int) -> Iterator[str]:
    """Adapters' own numbers, and what of the rest of the configuration they cannot be combined with."""
    lora, model = config.model.lora, config.model
    if lora is None:
        return
    if not 0 < lora.alpha < math.inf:
        yield f"model.lora.alpha {lora.alpha} scales adapters: use a positive number, as twice the rank"
    if not 0 <= lora.dropout < 1:
        yield f"model.lora.dropout {lora.dropout} is a probability: use 0 or more and less than 1"
    adapted = [component for component in COMPONENTS if lora_targets(lora, component)]
    if not adapted:
        yield "model.lora adapts nothing: name layers in decoder_targets or tower_targets, or set model.lora to null"
    for component in set(adapted) & set(config.training.freeze):
        yield (
            f"training.freeze names the {component}, and model.lora adapts it: leave it out of training.freeze (the "
            f"{component} is frozen but for its adapters), or empty model.lora.{component}_targets"
        )
    if "tower" in adapted and model.vision.tower != "vit":
        yield (
            f"model.lora.tower_targets are layers of the built-in tower, and model.vision.tower is "
            f"{model.vision.tower}: leave tower_targets empty"
        )
    if model.moe is not None and (experts := sorted(lora_targets(lora, "decoder") & {"linear_fc1", "linear_fc2"})):
        yield (
            f"model.lora.decoder_targets {', '.join(experts)}: experts have no adapters: adapt attention, with "
            "--model.lora.decoder_targets '[linear_qkv, linear_proj]'"
        )
    yield from _fp8(config, adapted)


def _fp8(config: MM1Config, adapted: list[str]) -> Iterator[str]:
    recipes = fp8_recipes(config.fp8)
    parts = {"decoder": ("decoder", "experts"), "tower": ("tower",)}
    for part in [part for component in adapted for part in parts[component] if recipes[part] != "bf16"]:
        yield (
            f"fp8.{part}_recipe is {recipes[part]}, and layers that are frozen beside adapters multiply in bf16 only: "
            "set it to bf16, or model.lora to null"
        )
