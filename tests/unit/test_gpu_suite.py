"""What the GPU tests rest on and a CPU can run: their references, models and helpers, and how skips are counted."""

import dataclasses
import math
import os
import re
import statistics
import subprocess
import sys
import warnings
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_mm1.config.validation import validate
from megatron_mm1.data.images.device import decode_on
from megatron_mm1.model.attention import LocalAttention, segment_mask
from megatron_mm1.parity.batches import synthetic_batches
from tests.gpu import (
    comparison,
    conftest,
    corpus,
    jobs,
    models,
    quantisation,
    stream,
    test_convergence,
    test_experts,
    test_image_decoding,
    test_packed_attention,
    test_training,
    test_transformer_engine,
    waits,
)

FOLDER = Path(conftest.__file__).parent
MODULES = sorted(FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def collected() -> str:
    """What a run of the GPU tests says on a machine without CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(FOLDER)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_without_a_gpu_every_test_says_why_it_did_not_run(collected):
    [(passed, skipped)] = re.findall(r"^(\d+) passed, (\d+) did not run$", collected, re.M)
    assert int(passed) == 0 and int(skipped) > 60
    reasons = re.findall(r"^  (\d+) x (.*)$", collected, re.M)
    assert sum(int(count) for count, _ in reasons) == int(skipped)
    assert all(reason.endswith("no CUDA device") for _, reason in reasons)
    assert re.search(rf"^{skipped} skipped(, \d+ warnings)? in", collected, re.M)  # and nothing else was collected


def test_every_module_is_for_gpus():
    for module in MODULES:
        assert re.search(r"^pytestmark = (GPU|TRANSFORMER_ENGINE|DALI)$", module.read_text(), re.M), module.name


def test_the_readme_lists_every_module():
    assert sorted(re.findall(r"^\| `(test_\w+\.py)`", (FOLDER / "README.md").read_text(), re.M)) == [
        module.name for module in MODULES
    ]


@pytest.mark.parametrize(
    ("status", "skipped", "has_device", "expected"),
    [(0, 2, True, 1), (0, 2, False, 0), (0, 0, True, 0), (2, 1, True, 2)],
)
def test_skipped_is_not_passed_on_a_gpu(status, skipped, has_device, expected):
    assert conftest.exit_status(status, skipped=skipped, has_device=has_device) == expected


def test_summary_counts_reasons():
    skipped = [SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}")) for reason in ("a", "b", "b")]
    assert conftest.summary([None] * 4, skipped) == ["4 passed, 3 did not run", "  2 x b", "  1 x a"]


def short(config):
    """`config` with sequences of 128 positions: seconds less."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=128))


@pytest.mark.parametrize("decoder", test_transformer_engine.DECODERS)
def test_comparison_of_decoders(groups, decoder):
    """The local backend beside itself, in bf16: every parameter has a gradient, of an error that bf16 explains."""
    config = short(models.small_config(**test_transformer_engine.DECODERS[decoder]))
    compute = partial(test_transformer_engine.logits, synthetic_batches(config, "mixed")[0].to(torch.device("cpu")))
    [first, second] = test_transformer_engine.bf16_errors(config, compute, groups, backends=("local", "local"))
    comparison.assert_no_worse(first, second, factor=1, floor=0)
    assert comparison.BF16_ROUNDING / 4 < first.output < 0.05
    assert all(error < 0.2 for error in first.gradients.values()), first.gradients
    assert any("tower" in name for name in first.gradients)


@pytest.mark.parametrize("num_images", [0, 2])
def test_comparison_of_towers(groups, num_images):
    config = models.small_config()
    pixels = torch.randn(num_images, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    compute = partial(test_transformer_engine.encoded, pixels)
    [errors] = test_transformer_engine.bf16_errors(config, compute, groups, backends=("local",))
    assert (errors.output > 0) == bool(num_images)
    assert all(error < 0.2 for error in errors.gradients.values())


def test_a_worse_gradient_is_named():
    fine = comparison.Errors(output=0.01, gradients={"a": 0.01, "b": 0.01})
    bad = dataclasses.replace(fine, gradients={"a": 0.01, "b": 0.05})
    comparison.assert_no_worse(bad, fine, factor=5)
    with pytest.raises(AssertionError, match=r"'b': '5.00e-02 > 3.00e-02'"):
        comparison.assert_no_worse(bad, fine, factor=3)
    with pytest.raises(AssertionError, match="'output': 'nan"):
        comparison.assert_no_worse(dataclasses.replace(fine, output=math.nan), fine, factor=3)


def test_vit_h_like_has_its_awkward_sizes():
    vision = models.VIT_H_LIKE
    assert vision.hidden_size / vision.num_attention_heads == 80
    assert (vision.image_size // vision.patch_size) ** 2 + vision.class_token == 730
    assert vision.activation == "quick_gelu"


@pytest.mark.parametrize("recipe", models.FP8_RECIPES)
def test_rounded_products_have_the_error_of_their_types(recipe):
    """e4m3 keeps 4 bits of a number and e5m2 3: relative errors are uniform up to 2^-4 and 2^-3 of a power of two."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((256, 512), (384, 512), (256, 384))
    )
    quantiser = quantisation.Quantiser.of(recipe)
    exact = quantisation.linear_with_gradients(x, weight, gradient)
    got = quantisation.linear_with_gradients(x, weight, gradient, quantiser=quantiser)
    output, input_gradient, weight_gradient = map(comparison.relative_error, got, exact)
    e4m3 = comparison.relative_error(quantiser.input(x), x)
    e5m2 = comparison.relative_error(quantiser.gradient(gradient), gradient)
    assert 2**-6 < e4m3 < 2**-5
    assert e5m2 == pytest.approx(e4m3 if recipe == "fp8_blockwise" else 2 * e4m3, rel=0.15)
    assert output == pytest.approx(math.sqrt(2) * e4m3, rel=0.1)  # two independent operands
    for error in (input_gradient, weight_gradient):
        assert error == pytest.approx(math.hypot(e4m3, e5m2), rel=0.1)


def test_blocks_are_scaled_alone():
    """A value a million times the others' costs a tensor's precision, and only its own block's."""
    x = torch.ones(2, 256, dtype=torch.float64) * 0.7
    x[0, 0] = 7e5
    assert quantisation.Quantiser.of("fp8_tensorwise").input(x)[1].abs().max() == 0
    blockwise = quantisation.Quantiser.of("fp8_blockwise").input(x)
    assert torch.allclose(blockwise[1], x[1]) and torch.allclose(blockwise[0, 128:], x[0, 128:])
    assert blockwise[0, 1:128].abs().max() == 0


@pytest.mark.parametrize("recipe", models.FP8_RECIPES)
def test_a_decoder_with_rounded_operands(groups, recipe):
    """Its error is that of FP8, not bf16's, and it shows in the gradients of the rounded layers."""
    config = short(models.small_config())
    weights = models.random_weights(config, groups)
    compute = partial(test_transformer_engine.logits, synthetic_batches(config, "no image")[0].to(torch.device("cpu")))
    exact = comparison.outcome(models.reference_model(config, weights, groups), compute, groups)
    rounded = models.reference_model(config, weights, groups)
    with quantisation.quantised(rounded, quantisation.Quantiser.of(recipe), under=("language_model.decoder.layers.",)):
        errors = comparison.errors(comparison.outcome(rounded, compute, groups), exact)
    assert 0.02 < errors.output < 0.3
    assert all(
        0.02 < error < 0.6
        for name, error in errors.gradients.items()
        if "linear_" in name and "layers" in name and "language_model" in name
    )


@pytest.mark.parametrize("heads", test_packed_attention.HEADS)
def test_dense_attention_is_the_local_backends(heads):
    num_heads, groups, head_dim = test_packed_attention.HEADS[heads]
    ids = test_packed_attention.segments(test_packed_attention.LENGTHS["unaligned"])
    query, key, value, gradient = (
        x.float() for x in test_packed_attention.inputs(len(ids), num_heads, groups, head_dim)
    )
    dense = partial(test_packed_attention.dense_attention, segment_ids=ids)
    local = LocalAttention(None, 1, None, "self")

    def attend(*qkv):
        return local(*(x.unsqueeze(1) for x in qkv), segment_mask(ids[None])).squeeze(1)

    ours, theirs = (
        test_packed_attention.with_gradients(way, query, key, value, gradient=gradient) for way in (dense, attend)
    )
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    test_packed_attention.assert_close(ours, theirs)
    broken = [theirs[0] * 1.1, *theirs[1:]]
    with pytest.raises(AssertionError, match="output"):
        test_packed_attention.assert_close(broken, theirs)


def test_the_stream_has_the_loss_it_says():
    """A model that knows the rule and the odds has the least loss on it, within the noise of 15,000 tokens."""
    config = models.small_config()
    batches = list(islice(stream.stream(config), 16))
    tokens = torch.cat([batch.tokens for batch in batches])[:, config.model.connector.tokens_per_image :] - 4
    follows = stream._TABLE[tokens[:, :-1]] == tokens[:, 1:]
    likely = stream.FAITHFUL + (1 - stream.FAITHFUL) / stream.ALPHABET
    other = (1 - stream.FAITHFUL) / stream.ALPHABET
    loss = torch.where(follows, -math.log(likely), -math.log(other)).mean()
    assert float(loss) == pytest.approx(stream.least_loss(), rel=0.05)
    assert torch.equal(next(stream.stream(config)).tokens, batches[0].tokens)


def test_a_small_model_learns_the_stream(groups):
    config = models.with_precision(short(models.small_config(hidden_size=128, ffn_hidden_size=256)), "fp32")
    losses = test_convergence.losses(config, groups, backend="local", steps=60)
    assert statistics.mean(losses[-5:]) < (losses[0] + stream.least_loss()) / 2


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_experts_beside_float64(groups, capacity):
    config = test_experts.moe_config(moe_expert_capacity_factor=capacity)
    weights, inputs = test_experts.layer_weights(config, groups), test_experts.layer_inputs(config)
    exact, bf16 = (
        test_experts.results(layer, inputs)
        for layer in (
            test_experts.loaded(models.with_precision(config, "fp32"), groups, weights, backend="local").double(),
            test_experts.loaded(config, groups, weights, backend="local"),
        )
    )
    for name, value in exact.items():
        assert 0 < comparison.relative_error(bf16[name], value) < 0.05, name


def test_experts_choose_alike_in_every_precision(groups):
    test_experts.test_no_choice_hangs_on_rounding(groups)


@pytest.mark.parametrize("name", test_training.PRESETS)
def test_training_and_going_on(pool, tmp_path, name):
    """The jobs of the training tests, with two steps on the CPU in the GPU's place."""
    config = corpus.training_config(name, tmp_path / "corpus", precision="fp32")
    validate(config, world_size=1)
    [start] = pool(1).run(jobs.save_initial, config, tmp_path / "start")
    [(first, weights)] = pool(1).run(
        jobs.train, test_training.starting_from(config, start, tmp_path / "first"), "local"
    )
    [(second, _)] = pool(1).run(jobs.train, test_training.starting_from(config, start, tmp_path / "second"), "local")
    assert first == second and len(first) == 5
    checkpoint = test_training.find_checkpoint(tmp_path / "first" / "checkpoints")
    [read] = pool(1).run(jobs.checkpoint_weights, config, checkpoint)
    test_training.assert_same_weights(read, weights)


@pytest.mark.parametrize("kind", test_image_decoding.KINDS)
def test_images_take_the_way_over_the_device(kind):
    """With the CPU as the device; DALI takes every kind, so nothing else decodes it on the GPU either."""
    files = test_image_decoding.images(kind)
    for ours, theirs in zip(decode_on(torch.device("cpu"), files), test_image_decoding.decode(files), strict=True):
        test_image_decoding.assert_near(ours.numpy(), theirs, lossy="JPEG" in kind)
    with pytest.raises(AssertionError):
        shifted = np.clip(theirs.astype(int) + 9, 0, 255)
        test_image_decoding.assert_near(shifted, theirs, lossy=True)


def test_waits_are_traced_to_their_function(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(waits, "PACKAGES", ("tests",))
    with waits.recorded_waits() as recorded:
        _read_loss()
        warnings.warn("another warning", stacklevel=1)
    assert len(recorded.stacks) == 1
    assert not recorded.elsewhere(["test_gpu_suite.py _read_loss"])
    assert next(iter(recorded.elsewhere(["step.py train_step"]))).split(" < ")[0].endswith(" _read_loss")


def _read_loss() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)


def test_calls_are_counted_within_the_region():
    def event(name, start, end=None, device="CPU"):
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(start=start, end=end or start),
        )

    events = [
        event(waits.REGION, 10, 20),
        event(waits.REGION, 10, 20, "CUDA"),
        event("cudaStreamSynchronize", 5),
        event("cudaStreamSynchronize", 15),
        event("cudaDeviceSynchronize", 25),
        event("Memcpy DtoH (Device -> Pageable)", 30, device="CUDA"),
        event("Memcpy HtoD (Pageable -> Device)", 12, device="CUDA"),
    ]
    assert waits.waiting_calls(events) == {"cudaStreamSynchronize": 1, "Memcpy DtoH": 1}


def test_the_profiler_gives_events_of_that_form():
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(waits.REGION):
        torch.ones(2).sum().item()
    assert waits.waiting_calls(profiler.events()) == {}
