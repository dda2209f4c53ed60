"""Which modules a decoder layer is made of, per backend, as megatron-core specs.

Both backends save their weights under the same names (Transformer Engine's, where a norm is part of the linear layer
that follows it), so a checkpoint written with one loads with the other.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MlpBuilder,
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_mm1.config.schema import AttentionKernel, Fp8Recipe
from megatron_mm1.model.activations import SwiGLU
from megatron_mm1.model.attention import LocalAttention
from megatron_mm1.model.linear import LocalColumnParallelLinear, LocalRowParallelLinear
from megatron_mm1.model.lora import NO_ADAPTERS, Adapters
from megatron_mm1.model.norms import LocalNorm
from megatron_mm1.model.packed_attention import PackedAttention
from megatron_mm1.model.precision import making_weights, with_recipe
from megatron_mm1.model.router import ExpertsLayer, Router


class LocalHybridStack(HybridStack):
    """HybridStack whose final norm is ours: megatron-core hard-wires Transformer Engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, post_layer_norm=False, post_process=post_process, **kwargs)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


@dataclass(frozen=True)
class LayerModules:
    """What the two backends build a layer from; `norm_and_column`: a column-parallel layer and the norm in front of it
    in one module, where there is one."""

    stack: type
    norm: type
    column_parallel: type
    row_parallel: type
    core_attention: type
    mask: AttnMaskType
    activation: type | None
    norm_and_column: type | None = None

    def normed_column(self, name: str, adapters: Adapters) -> tuple[Any, Any]:
        """What builds the norm in front of a column-parallel layer, and that layer; adapters need what is between."""
        if self.norm_and_column is not None and name not in adapters.targets:
            return IdentityOp, self.norm_and_column
        return self.norm, adapters.column(name, self.column_parallel)


def layer_modules(
    backend: str, *, context_parallel: bool = False, attention_kernel: AttentionKernel = "torch"
) -> LayerModules:
    """A backend's; the arguments are those of `decoder_stack_spec`."""
    if backend == "local":
        return LayerModules(
            stack=LocalHybridStack,
            norm=LocalNorm,
            column_parallel=LocalColumnParallelLinear,
            row_parallel=LocalRowParallelLinear,
            core_attention=LocalAttention,
            mask=AttnMaskType.arbitrary,  # the mask given at run time says everything
            activation=SwiGLU,
        )
    from megatron.core.extensions import transformer_engine as te

    core_attention: type = PackedAttention
    if attention_kernel == "transformer_engine":
        from megatron_mm1.model.te_attention import ContextParallelAttention, KernelAttention

        core_attention = ContextParallelAttention if context_parallel else KernelAttention
    return LayerModules(
        stack=HybridStack,
        norm=te.TENorm,
        column_parallel=te.TEColumnParallelLinear,
        row_parallel=te.TERowParallelLinear,
        core_attention=core_attention,
        mask=AttnMaskType.padding_causal,
        activation=None,  # megatron-core fuses it
        norm_and_column=te.TELayerNormColumnParallelLinear,
    )


def decoder_stack_spec(
    backend: str,
    *,
    qk_layernorm: bool,
    context_parallel: bool = False,
    experts_recipe: Fp8Recipe = "bf16",
    attention_kernel: AttentionKernel = "torch",
    adapters: Adapters = NO_ADAPTERS,
) -> ModuleSpec:
    """The decoder's stack: one layer spec per symbol of the layer pattern (`*` attention, `-` dense FFN, `E` experts).

    Args:
        backend: "transformer_engine" or "local".
        qk_layernorm: normalise queries and keys per head.
        context_parallel: ranks share the positions of a sequence.
        experts_recipe: how experts multiply, with Transformer Engine.
        attention_kernel: whose kernels attention runs, with Transformer Engine.
        adapters: of attention and of dense feed-forward layers.
    """
    modules = layer_modules(backend, context_parallel=context_parallel, attention_kernel=attention_kernel)
    input_norm, linear_qkv = modules.normed_column("linear_qkv", adapters)
    pre_mlp_norm, linear_fc1 = modules.normed_column("linear_fc1", adapters)
    qk_norm = modules.norm if qk_layernorm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=linear_qkv,
        core_attention=modules.core_attention,
        linear_proj=adapters.row("linear_proj", modules.row_parallel),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    attention_layer = TransformerLayerSubmodules(
        input_layernorm=input_norm,
        self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": modules.mask}, submodules=attention),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = MLPSubmodules(
        linear_fc1=linear_fc1,
        linear_fc2=adapters.row("linear_fc2", modules.row_parallel),
        activation_func=modules.activation,
    )
    mlp_layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=pre_mlp_norm,
        mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    moe_layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=modules.norm,  # several linear layers follow it, so it is never fused
        mlp=_experts_spec(recipe=experts_recipe if backend == "transformer_engine" else None),
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(
        module=modules.stack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention_layer),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp_layer),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=moe_layer),
        ),
    )


def _experts_spec(*, recipe: Fp8Recipe | None) -> MlpBuilder:
    """megatron-core's experts with our router; their number comes from the configuration.

    Args:
        recipe: of Transformer Engine's experts; None: the local ones.
    """
    layer = get_moe_module_spec(use_te=recipe is not None, num_experts=1, moe_grouped_gemm=recipe is not None)
    submodules = layer.keywords["submodules"]
    build = submodules.experts
    if recipe is None:
        build = partial(build, submodules=dataclasses.replace(build.keywords["submodules"], activation_func=SwiGLU))
    else:
        build = partial(_experts_of_recipe, build, recipe)
    experts = partial(_distinct_experts, build)
    replaced = dataclasses.replace(submodules, router=Router, experts=experts)
    return partial(ExpertsLayer, submodules=replaced, recipe=recipe)


def _experts_of_recipe(
    build: Any, recipe: Fp8Recipe, num_local_experts: int, config: TransformerConfig, **kwargs: Any
) -> Any:
    """Experts whose configuration says how they multiply, and not how the layers around them do."""
    config = with_recipe(config, recipe)
    with making_weights(config):
        return build(num_local_experts, config, **kwargs)


def _distinct_experts(build: Any, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> Any:
    """Experts whose initial weights differ between expert-parallel ranks.

    On a CPU megatron-core draws them from the generator that all ranks share, which would make each rank's experts
    copies of the first rank's. On a GPU it has a generator for experts, which this leaves alone.
    """
    seed = int(torch.randint(2**31, (), device="cpu"))  # the same on every rank, another for every layer
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed + pg_collection.ep.rank())
    experts = build(*args, pg_collection=pg_collection, **kwargs)
    torch.default_generator.set_state(state)
    return experts
