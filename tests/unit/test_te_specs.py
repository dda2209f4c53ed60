"""Every layer of every preset is the intended layer of Transformer Engine, with the intended sharding, in every layout.

Shapes are computed here from the configuration, not by the model's code.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_mm1.config import LoraConfig, MM1Config, ParallelConfig
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.schema import AttentionKernel
from tests import te_specs
from tests.te_specs import Layer

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP8+SP": (8, dict(tensor_model_parallel_size=8, sequence_parallel=True)),
    "TP2 CP2": (4, dict(tensor_model_parallel_size=2, context_parallel_size=2)),
    "TP4+SP, images shared": (
        4,
        dict(tensor_model_parallel_size=4, sequence_parallel=True, vision_parallel_mode="data"),
    ),
    "TP4+SP EP8": (32, dict(tensor_model_parallel_size=4, sequence_parallel=True, expert_model_parallel_size=8)),
}


def config_of(name: str, sizes: dict[str, Any], kernel: AttentionKernel) -> MM1Config:
    config = preset(name)
    training = dataclasses.replace(config.training, precision="bf16", attention_kernel=kernel)
    return dataclasses.replace(config, training=training, parallel=ParallelConfig(**sizes))


def fits(name: str, layout: str) -> bool:
    """Whether heads, and experts, divide."""
    config, sizes = preset(name), LAYOUTS[layout][1]
    tp, ep = sizes.get("tensor_model_parallel_size", 1), sizes.get("expert_model_parallel_size", 1)
    experts = config.model.moe.num_moe_experts if config.model.moe else 0
    shared = sizes.get("vision_parallel_mode") == "data"
    heads = [config.model.decoder.num_attention_heads] + ([] if shared else [config.model.vision.num_attention_heads])
    return all(count % tp == 0 for count in heads) and (ep == 1 or (experts > 0 and experts % ep == 0))


def expected(config: MM1Config) -> Iterator[tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]]:
    """(name, class, arguments, shapes of weights on a rank) of every layer."""
    decoder, vision, moe, parallel = config.model.decoder, config.model.vision, config.model.moe, config.parallel
    tp, sp = parallel.tensor_model_parallel_size, parallel.sequence_parallel
    width, heads = decoder.hidden_size, decoder.num_attention_heads
    groups, head = decoder.num_query_groups or heads, decoder.kv_channels or width // heads
    for block in range(decoder.num_layers):
        layer = f"language_model.decoder.layers.{2 * block}.self_attention"
        column = dict(parallel_mode="column", sequence_parallel=sp, normalization="RMSNorm", bias=False)
        row = dict(parallel_mode="row", sequence_parallel=sp, bias=False)
        yield from _projections(layer, width, heads, groups, head, tp, column, row)
        yield _core_attention(layer, heads, groups, head, tp, config.training.attention_kernel, "padding_causal")
        layer, ffn = f"language_model.decoder.layers.{2 * block + 1}", decoder.ffn_hidden_size
        if moe is None or (block + 1) % moe.moe_layer_freq:
            yield from _mlp(f"{layer}.mlp", width, ffn, 2, tp, column, row)
            continue
        ffn, count = moe.moe_ffn_hidden_size or ffn, moe.num_moe_experts // parallel.expert_model_parallel_size
        yield f"{layer}.pre_mlp_layernorm", "RMSNorm", dict(sequence_parallel=sp), {"weight": (width,)}
        for name, shape in {"linear_fc1": (2 * ffn, width), "linear_fc2": (width, ffn)}.items():
            weights = {f"weight{expert}": shape for expert in range(count)}
            yield f"{layer}.mlp.experts.{name}", "GroupedLinear", dict(num_gemms=count, bias=False), weights
    yield "language_model.decoder.final_norm", "RMSNorm", dict(sequence_parallel=sp), {"weight": (width,)}

    tp = tp if parallel.vision_parallel_mode == "tensor" else 1
    width, heads, ffn = vision.hidden_size, vision.num_attention_heads, vision.ffn_hidden_size
    column = dict(parallel_mode="column", sequence_parallel=False, normalization="LayerNorm", bias=True)
    row = dict(parallel_mode="row", sequence_parallel=False, bias=True)
    for block in range(vision.num_layers + 1 + vision.feature_layer):
        layer = f"tower.encoder.layers.{block}"
        attention, head = f"{layer}.self_attention", width // heads
        yield from _projections(attention, width, heads, heads, head, tp, column, row)
        yield _core_attention(attention, heads, heads, head, tp, config.training.attention_kernel, "no_mask")
        yield from _mlp(f"{layer}.mlp", width, ffn, 1, tp, column, row)


def _weights(rows: int, columns: int, bias: int | None, norm: str | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"weight": (rows, columns)}
    shapes |= {"bias": (bias,)} if bias else {}
    shapes |= {"layer_norm_weight": (columns,)} if norm else {}
    return shapes | ({"layer_norm_bias": (columns,)} if norm == "LayerNorm" else {})


def _core_attention(
    layer: str, heads: int, groups: int, head: int, tp: int, kernel: AttentionKernel, mask: str
) -> tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]:
    if kernel == "torch":
        return f"{layer}.core_attention", "PackedAttention", dict(causal="causal" in mask), {}
    arguments = dict(num_attention_heads=heads, num_gqa_groups=groups, kv_channels=head, attention_dropout=0.0)
    arguments |= dict(tp_size=tp, attn_mask_type=mask)
    return f"{layer}.core_attention", "DotProductAttention", arguments, {}


def _projections(
    layer: str, width: int, heads: int, groups: int, head: int, tp: int, column: Any, row: Any
) -> Iterator[tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]]:
    qkv = (heads + 2 * groups) * head // tp
    weights = _weights(qkv, width, qkv if column["bias"] else None, column["normalization"])
    yield f"{layer}.linear_qkv", "LayerNormLinear", column | dict(tp_size=tp), weights
    weights = _weights(width, heads * head // tp, width if row["bias"] else None, None)
    yield f"{layer}.linear_proj", "Linear", row | dict(tp_size=tp), weights


def _mlp(
    layer: str, width: int, ffn: int, gated: int, tp: int, column: Any, row: Any
) -> Iterator[tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]]:
    rows = gated * ffn // tp
    weights = _weights(rows, width, rows if column["bias"] else None, column["normalization"])
    yield f"{layer}.linear_fc1", "LayerNormLinear", column | dict(tp_size=tp), weights
    weights = _weights(width, ffn // tp, width if row["bias"] else None, None)
    yield f"{layer}.linear_fc2", "Linear", row | dict(tp_size=tp), weights


CASES = [(name, layout, "torch") for name in PRESETS for layout in LAYOUTS if fits(name, layout)]
CASES += [("mm1-30b", layout, "transformer_engine") for layout in LAYOUTS if fits("mm1-30b", layout)]


@pytest.mark.parametrize(("name", "layout", "kernel"), CASES, ids=[", ".join(case) for case in CASES])
def test_every_layer_is_the_intended_one(in_te_process, name, layout, kernel):
    world_size, sizes = LAYOUTS[layout]
    config = config_of(name, sizes, kernel)
    layers: dict[str, Layer] = in_te_process(te_specs.layers_on, config, rank=world_size - 1, world_size=world_size)
    connector = {name: layers.pop(name) for name in list(layers) if name.startswith("connector.")}
    assert connector and {layer.kind for layer in connector.values()} == {"Linear"}
    wanted = {name: rest for name, *rest in expected(config)}
    assert set(layers) == set(wanted)
    for layer_name, (kind, arguments, shapes) in wanted.items():
        layer = layers[layer_name]
        assert (layer_name, layer.kind, layer.shapes) == (layer_name, kind, shapes)
        found = layer.arguments | dict(tp_size=layer.tp_size)
        assert (layer_name, {key: found[key] for key in arguments}) == (layer_name, arguments)
        assert layer.dtypes <= {torch.bfloat16}


def test_norms_in_front_of_adapters_are_modules_of_their_own(in_te_process):
    config = config_of("mm1-3b", LAYOUTS["TP8+SP"][1], "torch")
    lora = LoraConfig(rank=4, alpha=8.0, decoder_targets=("linear_qkv", "linear_fc2"), tower_targets=("linear_fc1",))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    layers = in_te_process(te_specs.layers_on, config, rank=0, world_size=8)
    attention, mlp = "language_model.decoder.layers.0", "language_model.decoder.layers.1"
    kinds = {
        f"{attention}.input_layernorm": "RMSNorm",
        f"{attention}.self_attention.linear_qkv": "Linear",
        f"{mlp}.mlp.linear_fc1": "LayerNormLinear",
        f"{mlp}.mlp.linear_fc2": "Linear",
        "tower.encoder.layers.0.self_attention.linear_qkv": "LayerNormLinear",
        "tower.encoder.layers.0.pre_mlp_layernorm": "LayerNorm",
        "tower.encoder.layers.0.mlp.linear_fc1": "Linear",
    }
    assert {name: layers[name].kind for name in kinds} == kinds
    assert layers[f"{attention}.self_attention.linear_qkv"].shapes["lora_A"] == (4, config.model.decoder.hidden_size)
