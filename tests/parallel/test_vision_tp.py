"""The vision tower over two processes: tensor parallelism changes nothing, and a pipeline leaves it whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_mm1.config.schema import ParallelConfig, VisionConfig
from megatron_mm1.model.vision import VisionTower, vision_layer_spec, vision_transformer_config
from megatron_mm1.parallel.groups import build_process_groups, destroy_process_groups
from megatron_mm1.parity.workers import Pool

CONFIG = VisionConfig(
    image_size=28,
    patch_size=7,
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=4,
    patch_bias=True,
)
LAYOUTS = {
    "one": ParallelConfig(),
    "tensor": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pipeline": ParallelConfig(pipeline_model_parallel_size=2),
}


def full_weights(tower: VisionTower) -> dict[str, torch.Tensor]:
    """Distinct random values for every parameter, norms and biases too; the same in every process."""
    generator = torch.Generator().manual_seed(7)
    return {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in tower.named_parameters()}


def is_split(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def compute(parallel: ParallelConfig, weights: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """In every process: build the tower in one layout, load its share of `weights` (or draw them), run it both ways."""
    groups = build_process_groups(parallel, seed=11)
    tower = VisionTower(
        CONFIG,
        transformer_config=vision_transformer_config(CONFIG, parallel=parallel, precision="fp32"),
        layer_spec=vision_layer_spec("local"),
        pg_collection=groups,
    )
    initial = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    weights = weights or full_weights(tower)
    for name, parameter in tower.named_parameters():
        value = weights[name]
        if is_split(parameter):
            value = value.chunk(groups.tp.size(), dim=parameter.partition_dim)[groups.tp.rank()]
        parameter.data.copy_(value)

    generator = torch.Generator().manual_seed(13)
    features = tower(torch.randn(2, 3, 35, 28, generator=generator))
    (features * torch.randn(features.shape, generator=generator)).sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in tower.named_parameters() if parameter.grad is not None
    }

    tower.zero_grad()
    tower(torch.empty(0, 3, 28, 28)).sum().backward()
    sharded = tower.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    result = {
        "weights": weights,
        "initial": initial,
        "features": features.detach(),
        "gradients": gradients,
        "split": {name: p.partition_dim for name, p in tower.named_parameters() if is_split(p)},
        "sequence_parallel": [n for n, p in tower.named_parameters() if getattr(p, "sequence_parallel", False)],
        "gradient without images": sum(p.grad.abs().sum().item() for p in tower.parameters() if p.grad is not None),
        "layers": [layer.layer_number for layer in tower.encoder.layers],
        "keys": sorted({tensor.key for tensor in sharded.values()}),
        "stacked": sorted({t.global_shape[0] for k, t in tower.sharded_state_dict().items() if ".linear_proj.w" in k}),
    }
    destroy_process_groups()
    return result


@pytest.fixture(scope="module")
def ranks(pool: Callable[[int], Pool]) -> list[dict[str, Any]]:
    """What each of two processes computed, by layout."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name, parallel in LAYOUTS.items():
        weights = results["one"][0]["weights"] if results else None
        results[name] = pool(2).run(compute, parallel, weights)
    return [{name: result[rank] for name, result in results.items()} for rank in range(2)]


def gather(ranks: list[dict[str, Any]], what: str) -> dict[str, torch.Tensor]:
    """Tensors of the tensor-parallel layout put together from both ranks; replicated ones from the first."""
    first, second = (rank["tensor"][what] for rank in ranks)
    split = ranks[0]["tensor"]["split"]
    return {
        name: torch.cat([first[name], second[name]], dim=split[name]) if name in split else first[name]
        for name in first
    }


def test_blocks_are_split_and_the_rest_is_replicated(ranks: list[dict[str, Any]]) -> None:
    modules = {name.split(".", 3)[-1] for name in ranks[0]["tensor"]["split"]}
    assert modules == {
        *(f"self_attention.linear_{name}" for name in ("qkv.weight", "qkv.bias", "proj.weight")),
        *(f"mlp.linear_{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight")),
    }


def test_initial_weights_do_not_depend_on_the_tensor_parallel_size(ranks: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(gather(ranks, "initial"), ranks[0]["one"]["initial"], atol=0, rtol=0)


@pytest.mark.parametrize("what", ["initial", "gradients"])
def test_replicated_tensors_are_the_same_on_both_ranks(ranks: list[dict[str, Any]], what: str) -> None:
    first, second = (rank["tensor"] for rank in ranks)
    replicated = first[what].keys() - first["split"]
    assert {"class_token", "position_embeddings", "patch_embedding.bias", "final_layernorm.weight"} <= replicated
    for name in replicated:
        assert torch.equal(first[what][name], second[what][name]), name


def test_features_equal_one_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["tensor"]["features"], rank["one"]["features"], atol=1e-5, rtol=1e-5)


def test_gradients_equal_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = ranks[0]["one"]["gradients"]
    assert all(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(gather(ranks, "gradients"), expected, atol=1e-5, rtol=1e-5)


def test_no_image_is_no_gradient_and_no_hang(ranks: list[dict[str, Any]]) -> None:
    assert [rank["tensor"]["gradient without images"] for rank in ranks] == [0.0, 0.0]


def test_nothing_is_summed_again_under_the_decoders_sequence_parallelism(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["tensor"]["sequence_parallel"] == []


def test_a_pipeline_leaves_the_tower_whole(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["pipeline"]["layers"] == [1, 2, 3]
        assert rank["pipeline"]["keys"] == rank["one"]["keys"]
        assert rank["pipeline"]["stacked"] == [3]
        assert torch.equal(rank["pipeline"]["features"], rank["one"]["features"])
