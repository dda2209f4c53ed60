"""Adapters against Hugging Face's peft on the exported model: the same base, A and B give the same logits, gradients
and merged weights.

peft has an adapter for each of the linear layers that are one here: queries, keys and values, or gate and up. They are
given the same A, whose gradient is then the sum of theirs, and each its rows of B.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from megatron_mm1.checkpoint.merge import merge_adapters
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.checkpoint.transformers_export.files.modeling_mm1 import MM1ForConditionalGeneration
from megatron_mm1.config import LoraConfig, MM1Config, ModelConfig
from megatron_mm1.data.batch import IGNORE, ImageGroup, PackedBatch
from megatron_mm1.model.lora import is_adapter
from tests.corpora import small_tokenizer
from tests.integration.test_transformers_export import (
    CLIP,
    DENSE,
    MOE,
    config_of,
    connector,
    random_model,
    stored,
    write,
)

ATTENTION = ("linear_qkv", "linear_proj")
ALL = (*ATTENTION, "linear_fc1", "linear_fc2")
GQA = replace(DENSE, num_query_groups=2)
CASES = {
    "decoder and tower": ModelConfig(
        vision=CLIP,
        connector=connector("average_pool"),
        decoder=GQA,
        lora=LoraConfig(rank=3, alpha=6.0, tower_targets=ALL),
    ),
    "rsLoRA, some layers": ModelConfig(
        vision=CLIP,
        connector=connector("average_pool"),
        decoder=DENSE,
        lora=LoraConfig(
            rank=4,
            alpha=2.0,
            use_rslora=True,
            decoder_targets=("linear_proj", "linear_fc1"),
            tower_targets=("linear_qkv", "linear_fc2"),
        ),
    ),
    "attention beside experts": ModelConfig(
        vision=CLIP,
        connector=connector("average_pool"),
        decoder=GQA,
        moe=MOE,
        lora=LoraConfig(rank=2, alpha=4.0, decoder_targets=ATTENTION),
    ),
}


def their_layers(model: ModelConfig, name: str) -> list[tuple[str, Tensor]]:
    """What a layer of ours is in the exported model: names, and which rows of its output each has."""
    component, layer_number, layer = re.match(r"(\w+)\..*layers\.(\d+)\.\w+\.(\w+)$", name).groups()
    if component == "tower":
        place, part = f"model.vision_tower.layers.{layer_number}", model.vision
        heads = groups = part.num_attention_heads
        names = {"linear_proj": ["out_proj"], "linear_fc1": ["fc1"], "linear_fc2": ["fc2"]}
    else:
        place, part = f"model.language_model.layers.{int(layer_number) // 2}", model.decoder
        heads, groups = part.num_attention_heads, part.num_query_groups or part.num_attention_heads
        names = {"linear_proj": ["o_proj"], "linear_fc1": ["gate_proj", "up_proj"], "linear_fc2": ["down_proj"]}
    if layer == "linear_qkv":  # by query group: its queries, its key, its value
        dim = part.hidden_size // heads
        rows = torch.arange((heads + 2 * groups) * dim).view(groups, heads // groups + 2, dim)
        parts = {"q_proj": rows[:, :-2], "k_proj": rows[:, -2], "v_proj": rows[:, -1]}
        return [(f"{place}.self_attn.{theirs}", index.flatten()) for theirs, index in parts.items()]
    module = "self_attn" if layer == "linear_proj" else "mlp"
    size = part.ffn_hidden_size if layer == "linear_fc1" else part.hidden_size
    return [
        (f"{place}.{module}.{theirs}", torch.arange(number * size, (number + 1) * size))
        for number, theirs in enumerate(names[layer])
    ]


@dataclass
class Pair:
    """A model of ours with adapters, and the exported base with peft's."""

    config: MM1Config
    state: dict[str, Tensor]
    ours: torch.nn.Module
    theirs: Any
    folder: Any

    def layers(self) -> dict[str, list[tuple[Any, Any]]]:
        """By layer of ours, peft's layers and their rows."""
        names = [name.rpartition(".")[0] for name in self.state if name.endswith("lora_A")]
        found = {name: their_layers(self.config.model, name) for name in names}
        return {
            name: [(self.theirs.base_model.model.get_submodule(theirs), rows) for theirs, rows in parts]
            for name, parts in found.items()
        }


@pytest.fixture(scope="module", params=CASES)
def pair(request, groups, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("peft")
    tokenizer = small_tokenizer(folder)
    config = config_of(CASES[request.param], tokenizer)
    ours = random_model(config, groups)
    state = stored(ours, groups)
    base = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    write(folder / "base", replace(config, model=replace(config.model, lora=None)), base)
    exported = MM1ForConditionalGeneration.from_pretrained(folder / "base").eval()
    adapted = [name.rpartition(".")[0] for name in state if name.endswith("lora_A")]
    targets = [re.escape(theirs) for name in adapted for theirs, _ in their_layers(config.model, name)]
    lora = config.model.lora
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.use_rslora, target_modules="|".join(targets)
    )
    pair = Pair(config, state, ours, peft.get_peft_model(exported, settings), folder)
    with torch.no_grad():
        for name, parts in pair.layers().items():
            for layer, rows in parts:
                layer.lora_A["default"].weight.copy_(state[f"{name}.lora_A"])
                layer.lora_B["default"].weight.copy_(state[f"{name}.lora_B"][rows])
    return pair


def inputs(config: MM1Config, image_id: int) -> tuple[PackedBatch, dict[str, Tensor]]:
    """A sequence with two images, as either model takes it."""
    generator = torch.Generator().manual_seed(0)
    per_image = config.model.connector.tokens_per_image
    tokens = torch.randint(10, 60, (1, 40), generator=generator)
    slots = torch.stack([torch.arange(start, start + per_image) for start in (3, 20)])
    tokens[0, slots.flatten()] = image_id
    size = config.model.vision.image_size
    pixels = torch.randn(2, 3, size, size, generator=generator)
    batch = PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        position_ids=torch.arange(40)[None],
        segment_ids=torch.ones_like(tokens, dtype=torch.int32),
        source_ids=torch.zeros_like(tokens),
        images=(ImageGroup(slots=slots, height=size, width=size, pixels=pixels),),
    )
    return batch, {"input_ids": tokens, "pixel_values": pixels}


def test_logits_and_gradients_are_pefts(pair):
    batch, theirs = inputs(pair.config, pair.theirs.config.image_token_id)
    our_logits, their_logits = pair.ours(batch, return_logits=True), pair.theirs(**theirs).logits
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=1e-5)

    direction = torch.randn(our_logits.shape, generator=torch.Generator().manual_seed(1))
    for logits in (our_logits, their_logits):
        (logits * direction).mean().backward()
    gradients = {name: parameter.grad for name, parameter in pair.ours.named_parameters() if is_adapter(name)}
    assert len(gradients) == 2 * len(pair.layers()) > 0
    for name, parts in pair.layers().items():
        expected = sum(layer.lora_A["default"].weight.grad for layer, _ in parts)
        assert_equal(gradients[f"{name}.lora_A"], expected)
        for layer, rows in parts:
            assert_equal(gradients[f"{name}.lora_B"][rows], layer.lora_B["default"].weight.grad)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_merged_weights_are_pefts(pair):
    model, plan = merge_adapters(pair.config.model, StateDict(pair.state))
    assert model.lora is None
    write(pair.folder / "merged", replace(pair.config, model=model), collect(plan))
    ours = MM1ForConditionalGeneration.from_pretrained(pair.folder / "merged").state_dict()
    theirs = pair.theirs.merge_and_unload().state_dict()
    assert set(ours) == set(theirs)
    torch.testing.assert_close(ours, dict(theirs), atol=1e-6, rtol=1e-6)


def test_only_adapters_and_what_has_none_are_trained(pair):
    adapted = {name.split(".")[0] for name in pair.layers()}
    for name, parameter in pair.ours.named_parameters():
        assert parameter.requires_grad == (is_adapter(name) or name.split(".")[0] not in adapted), name
