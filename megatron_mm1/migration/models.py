"""What `--vision-model-type` and `--language-model-type` stand for in Megatron-LM's examples/multimodal/config.py.

Only what an MM1 can be: its decoders have RMSNorm, SwiGLU, rotary positions and no biases but those of queries, keys
and values, its towers are CLIP's and SigLIP's ViTs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mm1.config.schema import VisionConfig


@dataclass(frozen=True, kw_only=True)
class Language:
    """A `--language-model-type`.

    Attributes:
        ffn_hidden_size: which outranks the script's.
        vocab_size: of the published tokenizer; scripts do not say it, as the tokenizer does.
        add_qkv_bias: whether it sets it.
        projection: how the projection from the tower differs from our `mlp` connector, which is two layers with biases
            as wide as the decoder.
    """

    ffn_hidden_size: int
    vocab_size: int
    add_qkv_bias: bool = False
    projection: str


LANGUAGES: Mapping[str, Language] = {
    "llama3_8b": Language(ffn_hidden_size=14336, vocab_size=128256, projection="a norm, 14336 wide, without biases"),
    "llama3.1_8b": Language(ffn_hidden_size=14336, vocab_size=128256, projection="a LayerNorm in front"),
    "llama3.1_70B": Language(ffn_hidden_size=28672, vocab_size=128256, projection="none is defined"),
    "llama3.2_1b": Language(ffn_hidden_size=8192, vocab_size=128256, projection="a LayerNorm in front, without biases"),
    "mistral_7b": Language(ffn_hidden_size=14336, vocab_size=32768, projection="14336 wide, without biases"),
    "yi-34b": Language(
        ffn_hidden_size=20480, vocab_size=64000, projection="a LayerNorm in front, 20480 wide, without biases"
    ),
    "qwen2.0_72B": Language(
        ffn_hidden_size=29568,
        vocab_size=152064,
        add_qkv_bias=True,
        projection="a LayerNorm in front, 29568 wide, without biases",
    ),
    "qwen2.5_7B": Language(
        ffn_hidden_size=18944, vocab_size=152064, add_qkv_bias=True, projection="a norm in front, without biases"
    ),
    "qwen2.5_72B": Language(
        ffn_hidden_size=29568,
        vocab_size=152064,
        add_qkv_bias=True,
        projection="a LayerNorm in front, 29568 wide, without biases",
    ),
    "llama_nemotron_8b": Language(ffn_hidden_size=14336, vocab_size=128256, projection="a LayerNorm, 14336 wide"),
}

OTHER_LANGUAGES: Mapping[str, str] = {
    "nemotron5-hybrid": "Mamba layers and squared ReLU",
    "nemotron6": "Mamba layers and shared experts",
    "nemotron5": "squared ReLU",
    "hf://": "a transformers module, which megatron-core cannot split: import its weights instead (mm1 convert import)",
}
"""What a decoder of ours does not have, by what the type begins with."""

TOWERS: Mapping[str, VisionConfig] = {
    "clip": VisionConfig(
        num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, final_layernorm=False
    ),
    "siglip": VisionConfig(
        num_layers=27,
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_attention_heads=16,
        activation="gelu_tanh",
        layernorm_epsilon=1e-6,
        class_token=False,
        pre_layernorm=False,
        patch_bias=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
}

OTHER_TOWERS: Mapping[str, str] = {
    "internvit": "its blocks scale their outputs by learned factors",
    "radio": "it has several class tokens and cropped position embeddings",
    "cradio": "it has several class tokens and cropped position embeddings",
    "pixtral": "it rotates positions",
    "qwen-vl": "it rotates positions",
    "kimi": "it rotates positions",
    "hf://": "it is a transformers module: import its weights instead (mm1 convert import)",
}
"""Why a tower is none of ours, by what the type begins with."""
