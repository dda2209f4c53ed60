"""Each FP8 recipe: as far from float64 as rounding to e4m3 and e5m2 takes it, no farther and no less."""

import dataclasses
from functools import partial

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_recipe, is_float8tensor

from megatron_mm1.model.decoder import decoder_transformer_config
from megatron_mm1.parallel.device import device
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training.build import build_model, build_optimizer, named_parameters, unwrap
from megatron_mm1.training.step import train_step
from tests.gpu.comparison import assert_no_worse, errors, outcome, relative_error
from tests.gpu.marks import TRANSFORMER_ENGINE
from tests.gpu.models import (
    FP8_RECIPES,
    random_weights,
    reference_model,
    small_config,
    trained_model,
)
from tests.gpu.quantisation import Quantiser, linear_with_gradients, quantised

pytestmark = TRANSFORMER_ENGINE

BLOCKS_IN_FP8 = ("language_model.decoder.layers.",)
REPEATS = 3
"""Passes over the same data, so that delayed scales are those of the data."""


def decoder_config(recipe: str, **fp8):
    config = small_config()
    return dataclasses.replace(config, fp8=dataclasses.replace(config.fp8, decoder_recipe=recipe, **fp8))


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_linear_layer(recipe):
    """Output and both gradients have the error of rounded operands: more would be a fault, less would not be FP8."""
    import transformer_engine.pytorch as te

    generator = torch.Generator().manual_seed(0)
    shapes = ((384, 512), (512, 256), (384, 256))
    x, weight_t, gradient = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    weight = weight_t.T.contiguous()  # [out, in]
    exact = linear_with_gradients(x.double(), weight.double(), gradient.double())
    expected = linear_with_gradients(x.double(), weight.double(), gradient.double(), quantiser=Quantiser.of(recipe))

    layer = te.Linear(512, 256, bias=False, params_dtype=torch.bfloat16, device=device())
    layer.weight.data.copy_(weight)
    settings = get_fp8_recipe(decoder_transformer_config(decoder_config(recipe), backend="transformer_engine"))
    for _ in range(REPEATS):
        inputs = x.to(device()).requires_grad_()
        layer.weight.grad = None
        with te.autocast(enabled=True, recipe=settings):
            output = layer(inputs)
        output.backward(gradient.to(device()))
    for name, got, rounded, whole in zip(
        ("output", "input's gradient", "weight's gradient"),
        (output, inputs.grad, layer.weight.grad),
        expected,
        exact,
        strict=True,
    ):
        ratio = relative_error(got, whole) / relative_error(rounded, whole)
        assert 0.7 < ratio < 1.3, f"{name}: {ratio:.2f} of the error of rounded operands"


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_decoder_and_its_gradients(groups, recipe):
    """No farther from float64 than the local decoder in float64 whose layers round their operands, by half at most."""
    config = decoder_config(recipe)
    weights = random_weights(config, groups)
    batch = synthetic_batches(config, "mixed")[0].to(device())
    compute = partial(_logits, batch)
    exact = outcome(reference_model(config, weights, groups), compute, groups)
    simulated = reference_model(config, weights, groups)
    with quantised(simulated, Quantiser.of(recipe), under=BLOCKS_IN_FP8):
        expected = errors(outcome(simulated, compute, groups), exact)
    model = trained_model(config, weights, groups, backend="transformer_engine")
    got = errors(outcome(model, compute, groups, repeats=REPEATS), exact)
    assert_no_worse(got, expected, factor=1.5, floor=0.02)  # the floor: bf16 over two blocks
    assert got.output > 0.5 * expected.output, "suspiciously exact: are its products in FP8?"


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_blockwise"])
@pytest.mark.parametrize(("at_start", "at_end"), [(1, 0), (0, 1)])
def test_excepted_blocks_compute_as_bf16_ones(groups, recipe, at_start, at_end):
    """To the bit, on the inputs that they get; the other blocks do not."""
    config = decoder_config(recipe, bf16_blocks_at_start=at_start, bf16_blocks_at_end=at_end)
    weights = random_weights(config, groups)
    mixed = trained_model(config, weights, groups, backend="transformer_engine")
    plain = trained_model(small_config(), weights, groups, backend="transformer_engine")
    calls = []

    def record(module, args, kwargs, output):
        calls.append((args, kwargs, _hidden(output)))

    layers = unwrap(mixed).language_model.decoder.layers
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        _logits(synthetic_batches(config, "mixed")[0].to(device()), unwrap(mixed))
        for handle in handles:
            handle.remove()
        same = [
            torch.equal(_hidden(layer(*args, **kwargs)), output)
            for layer, (args, kwargs, output) in zip(unwrap(plain).language_model.decoder.layers, calls, strict=True)
        ]
    in_bf16 = [True, True, False, False] if at_start else [False, False, True, True]  # two layers a block
    assert same == in_bf16


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_weights_train_as_bf16_ones_do(groups, recipe):
    """The decoder's linear weights are FP8 tensors, and eight steps on one batch end near where bf16 weights end."""
    finals = {}
    for fp8_param in (False, True):
        config = decoder_config(recipe, fp8_param=fp8_param)
        config = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, use_distributed_optimizer=True)
        )
        torch.manual_seed(0)
        torch.cuda.manual_seed(0)
        model = build_model(config, backend="transformer_engine", pg_collection=groups)
        in_fp8 = {name for name, parameter in named_parameters(model) if is_float8tensor(parameter)}
        assert bool(in_fp8) == fp8_param
        assert all("language_model.decoder.layers" in name and "linear_" in name for name in in_fp8)
        optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
        batches = synthetic_batches(config, "mixed")
        losses = [
            train_step(config, model, optimizer, scheduler, batches, pg_collection=groups).losses.loss for _ in range(8)
        ]
        assert losses[-1] < losses[0]
        finals[fp8_param] = losses[-1]
    assert finals[True] == pytest.approx(finals[False], rel=0.03)


def _logits(batch, model):
    return model(batch, return_logits=True)


def _hidden(output):
    return output[0] if isinstance(output, tuple) else output
