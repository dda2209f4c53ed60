"""A whole transformers LlavaForConditionalGeneration as an MM1 with the `mlp` connector."""

from collections.abc import Mapping

from torch import Tensor

from megatron_mm1.checkpoint.decoder_mappings import import_llama_state
from megatron_mm1.checkpoint.vision_mappings import import_tower_state
from megatron_mm1.config.schema import ModelConfig


def import_llava_state(source: Mapping[str, Tensor], *, config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of an `MM1Model` (local backend, one process) from LLaVA's.

    LLaVA takes the output of the tower's last but one block without the last norm: `config.vision` has feature_layer -2
    and final_layernorm False.

    Raises:
        UserError: the weights and `config` do not fit together.
    """
    tower = import_tower_state(source, family="clip", config=config.vision, prefix="model.vision_tower.")
    decoder = import_llama_state(source, config=config.decoder, model_prefix="model.language_model.")
    projector = "model.multi_modal_projector."
    connector = {name.removeprefix(projector): tensor for name, tensor in source.items() if name.startswith(projector)}
    parts = {"tower": tower, "connector": connector, "language_model": decoder}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
