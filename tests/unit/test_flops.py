"""The FLOP model against torch's own counter, run on transformers' models and on this package's connectors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import ConnectorConfig, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_mm1.model.connectors import build_connector
from megatron_mm1.planning.flops import decoder_block_flops, output_flops, step_flops, vision_flops

VISION = VisionConfig(
    image_size=48, patch_size=8, num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4
)
DECODER = DecoderConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6, num_query_groups=2, vocab_size=256
)
MODEL = ModelConfig(decoder=DECODER, vision=VISION)


def counted(forward: Callable[[], Tensor]) -> int:
    """FLOPs of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return counter.get_total_flops()


def test_decoder_flops_are_those_of_llama() -> None:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=256,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config)
    reference = counted(lambda: llama(torch.zeros(1, 40, dtype=torch.int64)).logits)
    # Eager attention computes the masked half too; twice the segment length is the same work.
    blocks = sum(decoder_block_flops(MODEL, seq_length=40, block=block, segment_length=80) for block in range(2))
    assert blocks + output_flops(MODEL, seq_length=40) == reference


def connector_reference(config: ConnectorConfig) -> int:
    """Three times the forward pass: torch's counter takes the backward of a depthwise convolution for a dense one's."""
    connector = build_connector(config, vision_hidden_size=64, hidden_size=96, grid=(6, 6))
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        connector(torch.randn(1, 36, 64), (6, 6))
    return 3 * counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "tokens"), [("average_pool", 9), ("attention_pool", 8), ("c_abstractor", 9), ("mlp", 36)]
)
def test_vision_flops_are_those_of_clip_and_the_connector(kind: str, tokens: int) -> None:
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=48,
            patch_size=8,
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=160,
            num_attention_heads=4,
            attn_implementation="eager",
        )
    )
    connector = ConnectorConfig(
        connector=kind, tokens_per_image=tokens, hidden_size=80, num_layers=2, num_attention_heads=4
    )
    reference = counted(lambda: clip(torch.randn(1, 3, 48, 48)).last_hidden_state) + connector_reference(connector)
    assert vision_flops(replace(MODEL, connector=connector)) == reference


def test_blocks_after_the_feature_layer_cost_nothing() -> None:
    model = replace(MODEL, vision=replace(VISION, num_layers=3, feature_layer=-2))
    assert vision_flops(model) == vision_flops(MODEL)


def test_shorter_segments_cost_less_attention_and_nothing_else() -> None:
    full, half = (decoder_block_flops(MODEL, seq_length=64, block=0, segment_length=length) for length in (64, 32))
    assert full - half == 3 * 64 * 2 * 96 * 32


def test_experts_cost_a_router_and_the_top_k() -> None:
    model = replace(MODEL, moe=MoEConfig(num_moe_experts=8, moe_layer_freq=2, moe_ffn_hidden_size=64))
    dense, experts = (decoder_block_flops(model, seq_length=64, block=block) for block in (0, 1))
    assert experts - dense == 6 * 64 * 96 * 8 + 18 * 64 * 96 * (2 * 64 - 160)


def test_step_is_sequences_and_images() -> None:
    one = step_flops(MODEL, seq_length=64, num_sequences=1, num_images=0)
    assert step_flops(MODEL, seq_length=64, num_sequences=4, num_images=3) == 4 * one + 3 * vision_flops(MODEL)


def test_30b_step_is_near_six_times_parameters_times_positions() -> None:
    """The rule of thumb leaves out attention's own products, a tenth of the work at 4096 positions."""
    model = preset("mm1-30b").model
    flops = step_flops(model, seq_length=4096, num_sequences=512, num_images=0)
    assert flops == pytest.approx(6 * 30.2e9 * 512 * 4096, rel=0.1)
