"""Which tensors of the exported folder are which of an MM1.

The decoder has the names of transformers' Qwen and the tower nearly those of its CLIP, behind `model.language_model.`
and `model.vision_tower.`; the connector's are ours.
"""

from typing import Any

import torch

from megatron_mm1.checkpoint.decoders import decoder_correspondence
from megatron_mm1.checkpoint.rules import Correspondence, Rule, same
from megatron_mm1.checkpoint.towers import tower_correspondence
from megatron_mm1.config.derived import is_moe_block
from megatron_mm1.config.schema import ModelConfig
from megatron_mm1.model.connectors import build_connector

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
THEIR_EMBEDDING = "model.language_model.embed_tokens.weight"
THEIR_OUTPUT = "lm_head.weight"


def mm1_correspondence(model: ModelConfig, *, vocab_rows: int) -> Correspondence:
    """The tensors of a whole model.

    Args:
        vocab_rows: of the embeddings, padding included: those rows are exported too, as they take part in the softmax.
    """
    rules = (
        *tower_correspondence("clip", model.vision).renamed(_in_vision_tower).rules,
        *_connector(model),
        *_decoder(model, vocab_rows=vocab_rows),
    )
    unread = () if model.decoder.untie_embeddings_and_output_weights else (THEIR_OUTPUT,)
    return Correspondence(rules, unread=unread, components=("tower.", "connector.", "language_model."))


def _in_vision_tower(name: str) -> str:
    name = name.replace("encoder.layers.", "layers.").replace("pre_layrnorm", "pre_layernorm")  # CLIP's spelling
    return f"model.vision_tower.{name}"


def _connector(model: ModelConfig) -> list[Rule]:
    """Its modules are the same on both sides, so they are asked for their tensors."""
    side = model.vision.image_size // model.vision.patch_size
    with torch.device("meta"):
        connector: Any = build_connector(
            model.connector,
            vision_hidden_size=model.vision.hidden_size,
            hidden_size=model.decoder.hidden_size,
            grid=(side, side),
        )
    return [
        same(f"connector.{name}", f"model.connector.{name}", tuple(tensor.shape))
        for name, tensor in connector.state_dict().items()
    ]


def _decoder(model: ModelConfig, *, vocab_rows: int) -> list[Rule]:
    table = (vocab_rows, model.decoder.hidden_size)
    whole = {EMBEDDING: THEIR_EMBEDDING, OUTPUT: THEIR_OUTPUT}
    rules = [
        same(rule.ours, whole[rule.ours], table) if rule.ours in whole else rule
        for rule in decoder_correspondence(model).renamed(_in_language_model).rules
    ]
    if model.moe is not None and model.moe.moe_router_enable_expert_bias:
        rules += [
            same(
                f"language_model.decoder.layers.{2 * block + 1}.mlp.router.expert_bias",
                f"model.language_model.layers.{block}.mlp.gate.e_score_correction_bias",
                (model.moe.num_moe_experts,),
            )
            for block in range(model.decoder.num_layers)
            if is_moe_block(model, block)
        ]
    return rules


def _in_language_model(name: str) -> str:
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name
