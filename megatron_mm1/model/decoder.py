"""The decoder: megatron-core's HybridModel, described by our configuration."""

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mm1.config import Fp8Config, MM1Config, TrainingConfig
from megatron_mm1.config.derived import fp8_recipes, padded_vocab_size
from megatron_mm1.model.lora import Adapters
from megatron_mm1.model.output_loss import cross_entropy_with_z_loss
from megatron_mm1.model.precision import fp8_settings
from megatron_mm1.model.specs import decoder_stack_spec
from megatron_mm1.parallel.device import has_weight_gradient_kernel
from megatron_mm1.planning.stages import layer_pattern


def decoder_transformer_config(config: MM1Config, *, backend: str) -> TransformerConfig:
    """megatron-core's configuration of the decoder.

    Args:
        config: the whole configuration: model, parallel layout and precision are read.
        backend: "transformer_engine" or "local".
    """
    decoder, moe, parallel = config.model.decoder, config.model.moe, config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    transformer_engine = backend == "transformer_engine"
    experts = {}
    if moe is not None:
        experts = dict(
            num_moe_experts=moe.num_moe_experts,
            moe_ffn_hidden_size=moe.moe_ffn_hidden_size or decoder.ffn_hidden_size,
            moe_router_topk=moe.moe_router_topk,
            moe_router_score_function=moe.moe_router_score_function,
            moe_router_pre_softmax=moe.moe_router_pre_softmax,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=moe.moe_aux_loss_coeff,
            moe_z_loss_coeff=moe.moe_z_loss_coeff,
            moe_router_enable_expert_bias=moe.moe_router_enable_expert_bias,
            moe_router_bias_update_rate=moe.moe_router_bias_update_rate,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type=moe.moe_token_dispatcher_type,
            # Our router drops tokens itself, and padding always. Without a factor the dispatcher would take every token
            # to have all its experts instead of counting.
            moe_expert_capacity_factor=moe.moe_expert_capacity_factor or math.inf,
            moe_grouped_gemm=transformer_engine,
            moe_permute_fusion=transformer_engine,
            # Until training/step.py sets it. megatron-core keeps the shape of the first scale that a process sees, and
            # its own default is no scalar.
            moe_grad_scale_func=lambda: torch.ones(()),
        )
    return TransformerConfig(
        num_layers=2 * decoder.num_layers,  # HybridModel counts attention and feed-forward layers apart
        is_hybrid_model=True,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups or decoder.num_attention_heads,
        kv_channels=decoder.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.layernorm_epsilon,
        qk_layernorm=decoder.qk_layernorm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=decoder.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=decoder.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else None
        ),
        # Batched, what two pipeline ranks send each other forward and backward would be matched in the wrong order.
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size > 1,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size == 1,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Loss and gradients are divided once, by the global number of trained tokens, so that every layout computes
        # the same.
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        # apex alone has the kernel; docs/install.md. On the CPU training/accumulation.py switches ours on.
        gradient_accumulation_fusion=transformer_engine and has_weight_gradient_kernel(),
        bias_activation_fusion=transformer_engine,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        use_te_activation_func=not transformer_engine,  # means: the spec's activation, here ours
        apply_rope_fusion=transformer_engine or not torch.cuda.is_available(),  # parallel/cpu_kernels.py has one
        variable_seq_lengths=False,
        **_recomputation(config.training),
        **(_fp8(config.fp8) if transformer_engine else {}),
        **experts,
    )


def _fp8(fp8: Fp8Config) -> dict[str, Any]:
    settings = fp8_settings(fp8.decoder_recipe)
    if fp8.bf16_blocks_at_start or fp8.bf16_blocks_at_end:
        settings |= dict(
            first_last_layers_bf16=True,
            num_layers_at_start_in_bf16=2 * fp8.bf16_blocks_at_start,  # attention and feed-forward count apart
            num_layers_at_end_in_bf16=2 * fp8.bf16_blocks_at_end,
        )
    return settings | dict(fp8_param=fp8.fp8_param)


def _recomputation(training: TrainingConfig) -> dict[str, Any]:
    match training.recompute_granularity:
        case "full":
            return dict(
                recompute_granularity="full",
                recompute_method=training.recompute_method,
                recompute_num_layers=training.recompute_num_layers,
            )
        case "selective":
            return dict(recompute_granularity="selective", recompute_modules=list(training.recompute_modules))
        case _:
            return {}


class Decoder(HybridModel):
    """megatron-core's HybridModel whose loss has a z-loss where `z_loss_coeff` is not 0."""

    z_loss_coeff = 0.0

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s] labels and [s, b, vocabulary / tensor-parallel size] logits -> [b, s] losses."""
        if not self.z_loss_coeff:
            losses: Tensor = super().compute_language_model_loss(labels, logits)
            return losses
        group = self.pg_collection.tp
        losses = cross_entropy_with_z_loss(logits, labels.t(), coefficient=self.z_loss_coeff, group=group)
        return losses.t().contiguous()


def build_decoder(
    config: MM1Config,
    transformer_config: TransformerConfig,
    *,
    backend: str,
    pg_collection: ProcessGroupCollection,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> Decoder:
    """This rank's part of the decoder, or of its virtual stage.

    The embedding returns whole sequences also under sequence parallelism: images are injected before the scatter.
    """
    decoder = config.model.decoder
    model = Decoder(
        transformer_config,
        decoder_stack_spec(
            backend,
            qk_layernorm=decoder.qk_layernorm,
            context_parallel=config.parallel.context_parallel_size > 1,
            experts_recipe=fp8_recipes(config.fp8)["experts"],
            attention_kernel=config.training.attention_kernel,
            adapters=Adapters.of(config.model.lora, "decoder"),
        ),
        vocab_size=padded_vocab_size(decoder.vocab_size, config.parallel.tensor_model_parallel_size),
        max_sequence_length=config.data.seq_length,
        hybrid_layer_pattern=layer_pattern(config),
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not decoder.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=decoder.rotary_base,
        scatter_embedding_sequence_parallel=False,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    model.z_loss_coeff = config.training.output_z_loss_coeff
    if decoder.rope_scaling_factor is not None:  # HybridModel does not hand it on
        model.rotary_pos_emb = RotaryEmbedding(
            kv_channels=transformer_config.kv_channels,
            rotary_percent=1.0,
            rotary_base=decoder.rotary_base,
            rope_scaling=True,
            rope_scaling_factor=decoder.rope_scaling_factor,
            use_cpu_initialization=transformer_config.use_cpu_initialization,
            cp_group=pg_collection.cp,
        )
    return model
