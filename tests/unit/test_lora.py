"""Adapters' rules, and what planning says of them against the model that is built."""

from dataclasses import replace

import pytest
import torch

from megatron_mm1.config import LoraConfig, MM1Config
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.schema import LoraTarget
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError
from megatron_mm1.model.lora import is_adapter
from megatron_mm1.model.mm1 import MM1Model
from megatron_mm1.planning.flops import step_flops
from megatron_mm1.planning.memory import plan_memory
from megatron_mm1.planning.parameters import count_parameters
from megatron_mm1.planning.shards import rank_parameters

TARGETS: dict[str, tuple[LoraTarget, ...]] = {
    "attention": ("linear_qkv", "linear_proj"),
    "feed-forward": ("linear_fc1", "linear_fc2"),
    "one of each": ("linear_proj", "linear_fc1"),
}


def config_of(*options: str, preset: str = "mm1-tiny") -> MM1Config:
    small = ["--global_batch_size", "8", "--tensor_model_parallel_size", "1", "--expert_model_parallel_size", "1"]
    return load_config(["--preset", preset, *small, "--precision", "fp32", *options])


def adapted(config: MM1Config, **settings: object) -> MM1Config:
    lora = LoraConfig(**{"rank": 4, "alpha": 8.0, **settings})  # type: ignore[arg-type]
    return replace(config, model=replace(config.model, lora=lora))


@pytest.mark.parametrize("decoder", [*TARGETS, None])
@pytest.mark.parametrize("tower", [*TARGETS, None])
def test_planned_parameters_are_the_models(groups, decoder, tower):
    if decoder is tower is None:
        return
    targets = {"decoder_targets": TARGETS.get(decoder, ()), "tower_targets": TARGETS.get(tower, ())}
    config = adapted(config_of("--num_query_groups", "2"), **targets)
    with torch.device("meta"):
        model = MM1Model(config, backend="local", pg_collection=groups)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert count_parameters(config.model).total == rank_parameters(config, 0).total == sum(sizes.values())
    adapters = sum(size for name, size in sizes.items() if is_adapter(name))
    assert count_parameters(config.model).adapters == adapters > 0
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    (memory,) = plan_memory(config, world_size=1)
    assert memory.gradients == 4 * trained and memory.optimizer == 8 * trained


def test_tensor_parallel_ranks_share_half_of_each_adapter():
    config = adapted(config_of(), tower_targets=TARGETS["attention"])

    def adapters(**sizes: object) -> tuple[int, int]:
        parameters = rank_parameters(replace(config, parallel=replace(config.parallel, **sizes)), 0)
        return parameters.tower_adapters, parameters.decoder_adapters

    (tower, decoder), half = adapters(), {"tensor_model_parallel_size": 2}
    half_tower, half_decoder = adapters(**half, vision_parallel_mode="tensor")
    kept = 4 * config.model.vision.num_layers * 2 * config.model.vision.hidden_size  # A of qkv, B of proj
    assert half_tower == (tower - kept) // 2 + kept
    assert decoder / 2 < half_decoder < decoder
    assert adapters(**half, vision_parallel_mode="data") == (tower, half_decoder)


def test_frozen_weights_save_a_third_of_their_flops():
    config = config_of()

    def flops(config: MM1Config) -> float:
        return step_flops(config.model, seq_length=512, num_sequences=1, num_images=0)

    rank_1, rank_3 = (flops(adapted(config, rank=rank)) for rank in (1, 3))
    per_rank = (rank_3 - rank_1) / 2
    parameters = count_parameters(adapted(config, rank=1).model).adapters
    assert per_rank == 6 * 512 * parameters
    decoder = config.model.decoder
    attention = 3 * decoder.num_layers * 512 * 2 * decoder.hidden_size * 512
    assert rank_1 - per_rank - attention == pytest.approx((flops(config) - attention) * 2 / 3)


BASE = ["--model.lora.rank", "4", "--model.lora.alpha", "8"]
FAULTS = {
    "rank 0 is too small": ["--model.lora.rank", "0"],
    "alpha 0.0 scales adapters": ["--model.lora.alpha", "0"],
    "dropout 1.0 is a probability": ["--model.lora.dropout", "1"],
    "adapts nothing": ["--model.lora.decoder_targets", "[]"],
    "training.freeze names the decoder, and model.lora adapts it": ["--freeze", "[decoder]"],
    "layers of the built-in tower": [
        "--model.lora.tower_targets",
        "[linear_qkv]",
        "--model.vision.tower",
        "mine.Tower",
    ],
    "fp8.decoder_recipe is fp8_tensorwise": ["--precision", "bf16", "--fp8.decoder_recipe", "fp8_tensorwise"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_adapters_do_not_go_with(fault):
    with pytest.raises(ConfigError) as error:
        validate(config_of(*BASE, *FAULTS[fault]), world_size=1)
    assert any(fault in problem for problem in error.value.problems)


def test_experts_have_no_adapters_and_attention_beside_them_has():
    validate(config_of(*BASE, "--model.lora.decoder_targets", "[linear_qkv]", preset="mm1-tiny-moe"), world_size=1)
    with pytest.raises(ConfigError, match="adapt attention"):
        validate(config_of(*BASE, preset="mm1-tiny-moe"), world_size=1)
