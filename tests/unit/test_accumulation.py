"""Gradients that are added to the gradient buffer where they are computed are those that autograd would have added."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_mm1.config.loading import load_config
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training import build
from megatron_mm1.training.accumulation import RowwiseEmbedding
from megatron_mm1.training.step import forward_backward

CASES = {
    "dense": [],
    "experts": ["--preset", "mm1-tiny-moe"],
    "tied output": ["--untie_embeddings_and_output_weights", "false"],
    "overlapped reduction": ["--overlap_grad_reduce", "true"],
    "distributed optimizer": ["--use_distributed_optimizer", "true"],
    "bf16": ["--precision", "bf16"],
    "frozen decoder": ["--freeze", "[decoder]"],
}


def built(options, groups):
    one_process = ["--tensor_model_parallel_size", "1", "--expert_model_parallel_size", "1"]
    small = ["--data.sources", "[]", "--seq_length", "128", "--micro_batch_size", "1", "--global_batch_size", "2"]
    preset = [] if "--preset" in options else ["--preset", "mm1-tiny"]
    config = load_config([*preset, *options, *one_process, *small])
    torch.manual_seed(0)
    return config, build.build_model(config, backend="local", pg_collection=groups)


def gradients(options, groups):
    """Of two microbatches, by parameter."""
    config, model = built(options, groups)
    forward_backward(config, model, synthetic_batches(config, "mixed"), pg_collection=groups)
    trained = [(name, parameter) for name, parameter in build.named_parameters(model) if parameter.requires_grad]
    return {name: parameter.main_grad.clone() for name, parameter in trained}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autograds(case, groups, monkeypatch):
    ours = gradients(CASES[case], groups)
    monkeypatch.setattr(build, "accumulate_in_place", lambda model: None)
    expected = gradients(CASES[case], groups)
    assert ours.keys() == expected.keys()
    # In bf16 autograd rounds a weight's gradient to bf16 before it is added to the buffer, and ours does not.
    tolerance = 2e-2 if case == "bf16" else 1e-5
    for name, gradient in ours.items():
        scale = expected[name].abs().max().clamp(min=1e-8)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, atol=tolerance, rtol=0, msg=name)


def test_every_linear_layer_and_embedding_takes_part(groups):
    """Tower and decoder; without gradient buffers (inference, a model by itself) none does."""
    config, model = built([], groups)
    parts = ColumnParallelLinear | RowParallelLinear
    linear = [module for module in model[0].modules() if isinstance(module, parts)]
    assert len(linear) == 4 * (config.model.decoder.num_layers + config.model.vision.num_layers) + 1
    assert all(module.gradient_accumulation_fusion for module in linear)
    assert any(isinstance(module, RowwiseEmbedding) for module in model[0].modules())
    alone = build.build_module(config, backend="local", pg_collection=groups)
    assert not any(module.gradient_accumulation_fusion for module in alone.modules() if isinstance(module, parts))
    assert not any(isinstance(module, RowwiseEmbedding) for module in alone.modules())
