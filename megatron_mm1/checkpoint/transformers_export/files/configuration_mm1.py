"""Configuration of an MM1 model: image tower, connector and decoder."""

from typing import Any

import transformers
from packaging.version import Version
from transformers import PretrainedConfig

if Version(transformers.__version__) < Version("5.16"):
    raise ImportError(f"MM1 needs transformers 5.16 or newer, this is {transformers.__version__}")


class MM1VisionConfig(PretrainedConfig):
    """The vision transformer. `vision_feature_layer` is -1 for the last block's output, -2 for that of the one before;
    later blocks are not built.
    """

    model_type = "mm1_vision"

    def __init__(
        self,
        image_size: int = 378,
        patch_size: int = 14,
        hidden_size: int = 1280,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        use_class_token: bool = True,
        use_pre_layernorm: bool = True,
        use_patch_bias: bool = False,
        use_post_layernorm: bool = True,
        vision_feature_layer: int = -1,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.use_class_token = use_class_token
        self.use_pre_layernorm = use_pre_layernorm
        self.use_patch_bias = use_patch_bias
        self.use_post_layernorm = use_post_layernorm
        self.vision_feature_layer = vision_feature_layer
        super().__init__(**kwargs)


class MM1ConnectorConfig(PretrainedConfig):
    """What makes tokens of an image's features: average_pool, attention_pool, c_abstractor or mlp."""

    model_type = "mm1_connector"

    def __init__(
        self,
        connector: str = "c_abstractor",
        tokens_per_image: int = 144,
        hidden_size: int = 1024,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 16,
        **kwargs: Any,
    ) -> None:
        self.connector = connector
        self.tokens_per_image = tokens_per_image
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        super().__init__(**kwargs)


class MM1TextConfig(PretrainedConfig):
    """The decoder. Block i (from 0) has experts where num_experts > 0 and (i + 1) % decoder_sparse_step == 0.

    `scoring_func` is softmax or sigmoid; with `norm_topk_prob` the weights of a token's experts sum to 1;
    `use_expert_bias` adds a bias to the scores by which experts are chosen, and not to their weights.
    """

    model_type = "mm1_text"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 3072,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 26,
        num_attention_heads: int = 24,
        num_key_value_heads: int = 24,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        use_qk_norm: bool = False,
        tie_word_embeddings: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        decoder_sparse_step: int = 1,
        moe_intermediate_size: int = 8192,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = True,
        use_expert_bias: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.attention_bias = attention_bias
        self.use_qk_norm = use_qk_norm
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.decoder_sparse_step = decoder_sparse_step
        self.moe_intermediate_size = moe_intermediate_size
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.use_expert_bias = use_expert_bias
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def has_experts(self, block: int) -> bool:
        """Whether decoder block `block` (from 0) has experts in place of its feed-forward layer."""
        return self.num_experts > 0 and (block + 1) % self.decoder_sparse_step == 0


class MM1Config(PretrainedConfig):
    """The whole model. `image_token_id` marks the positions that image features take."""

    model_type = "mm1"
    sub_configs = {  # noqa: RUF012  # as transformers declares it
        "vision_config": MM1VisionConfig,
        "connector_config": MM1ConnectorConfig,
        "text_config": MM1TextConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | MM1VisionConfig | None = None,
        connector_config: dict[str, Any] | MM1ConnectorConfig | None = None,
        text_config: dict[str, Any] | MM1TextConfig | None = None,
        image_token_id: int = 4,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _part(MM1VisionConfig, vision_config)
        self.connector_config = _part(MM1ConnectorConfig, connector_config)
        self.text_config = _part(MM1TextConfig, text_config)
        self.image_token_id = image_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def _part(kind: type, value: Any) -> Any:
    return value if isinstance(value, kind) else kind(**(value or {}))
