"""The image encoder: a vision transformer on megatron-core's layers, CLIP's and SigLIP's forms of it.

A tower of the user's own is chosen by its class path (`model.vision.tower`); `Tower` says what it must offer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.activations import quick_gelu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_mm1.config.derived import num_vision_blocks
from megatron_mm1.config.schema import AttentionKernel, Fp8Recipe, ParallelConfig, VisionConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.extension import resolve
from megatron_mm1.model.lora import NO_ADAPTERS, Adapters, with_gradient
from megatron_mm1.model.norms import LocalNorm
from megatron_mm1.model.packed_attention import EqualExamples
from megatron_mm1.model.positions import interpolate_positions
from megatron_mm1.model.precision import fp8_settings, input_row_multiple
from megatron_mm1.model.specs import layer_modules
from megatron_mm1.parallel.device import device

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}

FUSED_NORM_NAMES: Mapping[str, str] = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""A layer's norms by the local backend's names, and by Transformer Engine's, which fuses them into the linear layer
that follows. Distributed checkpoints use the latter with both backends."""

INIT_STD = 0.02
"""Standard deviation of initial weights; those that end a residual branch have it divided by sqrt(2 num_layers)."""


def vision_transformer_config(
    vision: VisionConfig,
    *,
    parallel: ParallelConfig,
    precision: str,
    recompute: bool = False,
    fp8_recipe: Fp8Recipe = "bf16",
) -> TransformerConfig:
    """megatron-core's configuration of the tower.

    Built from scratch and not from the decoder's, so that no pipeline, expert or sequence-parallel setting leaks in:
    the tower lives whole on one pipeline stage, and its sequence is not split (729 patches and a class token divide by
    neither 4 nor 8).

    Args:
        precision: "bf16" or "fp32", of parameters and activations.
        recompute: keep only the input of each block for the backward pass.
        fp8_recipe: how linear layers multiply, with Transformer Engine.

    Raises:
        ConfigError: `feature_layer` names no block.
    """
    if not -vision.num_layers <= vision.feature_layer <= -1:
        raise ConfigError(
            [
                f"model.vision.feature_layer is {vision.feature_layer}, but a tower of {vision.num_layers} blocks has "
                f"-{vision.num_layers} to -1"
            ]
        )
    bf16 = precision == "bf16"
    recomputation: dict[str, Any] = {}
    if recompute:
        recomputation = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(
        num_layers=num_vision_blocks(vision),
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=ACTIVATIONS[vision.activation],
        gated_linear_unit=False,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=INIT_STD,
        tensor_model_parallel_size=(
            1 if parallel.vision_parallel_mode == "data" else parallel.tensor_model_parallel_size
        ),
        pipeline_model_parallel_size=1,
        sequence_parallel=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        # Draws whole matrices on every rank and slices them: the weights do not depend on the tensor-parallel size.
        use_cpu_initialization=device().type == "cpu",
        # megatron-core's fused bias and GELU is the tanh form whatever activation_func says.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **recomputation,
        **fp8_settings(fp8_recipe),
    )


def vision_layer_spec(
    backend: str, *, attention_kernel: AttentionKernel = "torch", adapters: Adapters = NO_ADAPTERS
) -> ModuleSpec:
    """The modules of one pre-norm encoder layer.

    Args:
        backend: "local" or "transformer_engine", as `parallel.device.layer_backend` resolves it.
        attention_kernel: whose kernels attention runs, with Transformer Engine.
        adapters: of its linear layers.
    """
    modules = layer_modules(backend, attention_kernel=attention_kernel)
    input_norm, linear_qkv = modules.normed_column("linear_qkv", adapters)
    pre_mlp_norm, linear_fc1 = modules.normed_column("linear_fc1", adapters)
    attention = SelfAttentionSubmodules(
        linear_qkv=linear_qkv,
        core_attention=modules.core_attention,
        linear_proj=adapters.row("linear_proj", modules.row_parallel),
    )
    mlp = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=adapters.row("linear_fc2", modules.row_parallel))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORM_NAMES),
        ),
    )


class Tower(Protocol):
    """What an image encoder must offer: a torch.nn.Module, built by `build_tower` on the first pipeline stage.

    Its input is the same on every tensor-parallel rank, and its output must be. A tower that is not itself
    tensor-parallel need do nothing for that: its parameters start alike on all ranks if they are drawn from torch's
    default generator.
    """

    hidden_size: int
    """Width of the features."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        transformer_config: TransformerConfig,
        layer_spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
    ) -> None: ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of features of an image of height x width px; raises UserError for a size it cannot take."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] float32, normalised -> [N, rows * columns, hidden_size], row by row.

        N may be 0: the output is then empty but still connected to the parameters, so that each gets a gradient (of
        zeros), which gradient reduction between ranks waits for.
        """
        ...


class VisionTower(MegatronModule):
    """Vision transformer with learned positions, tensor-parallel in its blocks; the rest is replicated.

    Args:
        config: shape and the parts that CLIP and SigLIP differ in.
        transformer_config: of `vision_transformer_config`.
        layer_spec: of `vision_layer_spec`.
        pg_collection: `tp` and `cp` are used; the pipeline group is not, as transformer_config has one stage.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        transformer_config: TransformerConfig,
        layer_spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(transformer_config)
        self.tp_group = pg_collection.tp
        self.patch_size = config.patch_size
        self.hidden_size = config.hidden_size
        self.base_grid = self.grid(config.image_size, config.image_size)

        width, dtype = config.hidden_size, transformer_config.params_dtype
        self.patch_embedding = torch.nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=config.patch_bias, dtype=dtype
        )
        self.class_token = torch.nn.Parameter(torch.empty(width, dtype=dtype)) if config.class_token else None
        positions = int(config.class_token) + self.base_grid[0] * self.base_grid[1]
        self.position_embeddings = torch.nn.Parameter(torch.empty(positions, width, dtype=dtype))
        self.pre_layernorm = self._norm() if config.pre_layernorm else None
        self.encoder = TransformerBlock(
            transformer_config,
            layer_spec,
            post_layer_norm=False,
            pre_process=True,
            post_process=True,
            pg_collection=pg_collection,
        )
        self.final_layernorm = self._norm() if config.final_layernorm else None
        self._initialize()

    def _norm(self) -> LocalNorm:
        return LocalNorm(self.config, self.hidden_size, self.config.layernorm_epsilon)

    def _initialize(self) -> None:
        """Fill what megatron-core has not: from the default generator, seeded alike on all tensor-parallel ranks."""
        torch.nn.init.normal_(self.patch_embedding.weight, std=INIT_STD)
        torch.nn.init.normal_(self.position_embeddings, std=INIT_STD)
        if self.patch_embedding.bias is not None:
            torch.nn.init.zeros_(self.patch_embedding.bias)
        if self.class_token is not None:
            torch.nn.init.normal_(self.class_token, std=INIT_STD)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches.

        Raises:
            UserError: a side is not a multiple of the patch size.
        """
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"an image of {height} x {width} px does not divide into patches of {self.patch_size} px: "
                "use multiples of it"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: [N, 3, H, W], normalised; any N, and any H and W that are multiples of the patch size.

        Returns:
            [N, (H / patch) * (W / patch), hidden_size], parameter dtype, patches row by row, without the class token.
        """
        if pixels.shape[0] == 0:
            # Attention kernels refuse empty batches, and gradient reduction waits for every parameter: encode a blank
            # image and keep nothing of it.
            return self._encode(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        return self._encode(pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        grid = self.grid(*pixels.shape[-2:])
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [N, C, h, w]
        hidden_states = patches.flatten(2).transpose(1, 2)  # [N, h * w, C]
        prefix = 0
        if self.class_token is not None:
            prefix = 1
            class_tokens = self.class_token.expand(hidden_states.shape[0], 1, -1)
            hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
        hidden_states = hidden_states + interpolate_positions(
            self.position_embeddings, from_grid=self.base_grid, to_grid=grid, prefix_tokens=prefix
        )
        if self.pre_layernorm is not None:
            hidden_states = self.pre_layernorm(hidden_states)
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            hidden_states = with_gradient(hidden_states)  # where adapters are all that is trained
        features = self._blocks(hidden_states)[:, prefix:]
        if self.final_layernorm is not None:
            features = self.final_layernorm(features)
        return features.contiguous()

    def _blocks(self, hidden_states: Tensor) -> Tensor:
        """[N, tokens, C] -> the same."""
        multiple = input_row_multiple(self.config)
        if multiple == 1:
            return self.encoder(hidden_states.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)
        # FP8 products want more round numbers of rows than images have tokens (730): all images make one packed
        # sequence, with rows of zeros at its end for an example of their own.
        rows = hidden_states.flatten(0, 1)
        sequence = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % multiple))
        images, tokens, _ = hidden_states.shape
        output = self.encoder(
            sequence.unsqueeze(1),
            attention_mask=None,
            packed_seq_params=_boundaries(images, tokens, len(sequence), device=sequence.device),
        )
        return output.squeeze(1)[: len(rows)].view(hidden_states.shape)


def _boundaries(images: int, tokens: int, length: int, *, device: torch.device) -> EqualExamples:
    """Where each image's tokens begin in a packed sequence, and what is left of its `length` positions."""
    starts = torch.arange(images + 1, dtype=torch.int32, device=device) * tokens
    padding = length - images * tokens
    if padding:
        starts = torch.nn.functional.pad(starts, (0, 1), value=length)
    longest = max(tokens, padding)
    return EqualExamples(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        examples=images,
        length=tokens,
    )


TOWERS: Mapping[str, Any] = {"vit": VisionTower}


def build_tower(
    config: VisionConfig,
    *,
    transformer_config: TransformerConfig,
    layer_spec: ModuleSpec,
    pg_collection: ProcessGroupCollection,
) -> Tower:
    """The tower `config.tower` names: built-in, or a class of the user's own that offers what `Tower` says.

    Raises:
        UserError: there is no such tower.
    """
    tower = resolve("vision tower", config.tower, TOWERS)
    return tower(config, transformer_config=transformer_config, layer_spec=layer_spec, pg_collection=pg_collection)
