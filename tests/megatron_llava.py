"""A small LLaVAModel of megatron-core's with random weights, on the CPU."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_mm1.checkpoint.tensors import StateDict
from megatron_mm1.config import DecoderConfig, ModelConfig, VisionConfig
from tests.canonical import randomize

IMAGE, IMAGE_SIZE, PER_IMAGE, VOCABULARY, HIDDEN = -200, 32, 16, 200, 48
BASE = ModelConfig(
    vision=VisionConfig(num_attention_heads=4, activation="gelu", layernorm_epsilon=1e-6),
    decoder=DecoderConfig(
        num_layers=1,
        hidden_size=12,
        ffn_hidden_size=1,
        num_attention_heads=6,
        rotary_base=5000.0,
        layernorm_epsilon=1e-6,
    ),
)
"""What the shapes of `build_llava`'s tensors do not say."""

_COMMON: dict[str, Any] = dict(
    layernorm_epsilon=1e-6,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    use_cpu_initialization=True,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
)


def build_llava(
    groups: ProcessGroupCollection,
    *,
    tower: str = "clip",
    qk_layernorm: bool = False,
    fused_norm_names: bool = False,
    language: dict[str, Any] | None = None,
    projection: dict[str, Any] | None = None,
    **settings: Any,
) -> LLaVAModel:
    """One in this process, every tensor random and distinct.

    LLaVAModel leaves the norms around its tower's layers to CLIPViTModel's default, which without Transformer Engine is
    torch's LayerNorm and cannot be built (it knows no `hidden_size`); here they are megatron-core's wrapper of it, as
    in the layers.
    """
    decoder_config = TransformerConfig(
        **_COMMON,
        **{
            **dict(
                num_layers=2,
                hidden_size=HIDDEN,
                ffn_hidden_size=96,
                num_attention_heads=6,
                num_query_groups=2,
                normalization="RMSNorm",
                gated_linear_unit=True,
                activation_func=torch.nn.functional.silu,
                add_bias_linear=False,
                qk_layernorm=qk_layernorm,
            ),
            **(language or {}),
        },
    )
    gelu = dict(activation_func=torch.nn.functional.gelu, **_COMMON)
    vision_config = TransformerConfig(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, **gelu)
    vision_config.vision_model_type = tower
    projection_config = TransformerConfig(
        **{
            **dict(num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=HIDDEN, num_attention_heads=1),
            **gelu,
            **(projection or {}),
        }
    )
    spec = decoder_model_with_local_default_spec(qk_layernorm=qk_layernorm)
    if fused_norm_names:  # saved under Transformer Engine's names
        spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    vit = partial(CLIPViTModel, ln_pre_impl=WrappedTorchNorm, ln_post_impl=WrappedTorchNorm)
    with patch.object(llava_model, "CLIPViTModel", vit):
        model = LLaVAModel(
            language_transformer_config=decoder_config,
            language_transformer_layer_spec=spec,
            language_vocab_size=VOCABULARY,
            language_max_sequence_length=256,
            vision_transformer_config=vision_config,
            vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
            drop_vision_class_token=tower != "siglip",
            vision_projection_config=projection_config,
            vision_projection_layer_spec=MLPSubmodules(ColumnParallelLinear, RowParallelLinear),
            language_rotary_base=5000,
            img_h=IMAGE_SIZE,
            img_w=IMAGE_SIZE,
            patch_dim=8,
            pg_collection=groups,
            **{"language_position_embedding_type": "rope", **settings},
        )
    randomize(model)
    return model.eval()


def save_llava(model: LLaVAModel, folder: Path, groups: ProcessGroupCollection, *, numbered_layers: bool) -> Path:
    """Write megatron-core's distributed checkpoint."""
    folder.mkdir()
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": numbered_layers, "dp_cp_group": groups.dp_cp})
    dist_checkpointing.save(state, str(folder))
    return folder


def read_distributed(folder: Path) -> StateDict:
    """All tensors of a distributed checkpoint, by torch's own reader."""
    reader = dcp.FileSystemReader(folder)
    found = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return StateDict(state)
