"""The parts of training that need no corpus: optimizer, schedule, validation's exchange of images, console line."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import BatchSizeStage
from megatron_mm1.data.batch import Boundaries, ImageGroup
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.planning.flops import step_flops
from megatron_mm1.training.build import (
    COMPONENTS,
    build_model,
    build_optimizer,
    component_learning_rates,
    component_of,
    named_parameters,
    unwrap,
)
from megatron_mm1.training.figures import Window
from megatron_mm1.training.freezing import frozen_components
from megatron_mm1.training.logging import console_line
from megatron_mm1.training.step import LossStatistics, StepStatistics, train_step
from megatron_mm1.training.validation import exchange_images


def tiny(**optimizer):
    """mm1-tiny in one process, with small batches."""
    config = preset("mm1-tiny")
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, tensor_model_parallel_size=1),
        training=dataclasses.replace(config.training, micro_batch_size=1, global_batch_size=2, train_iters=40),
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        data=dataclasses.replace(config.data, sources=()),
    )


@pytest.fixture
def trained(groups):
    """`trained(**optimizer settings)`: (model, optimizer, scheduler, config, weights before) after three steps."""

    def run(**settings):
        config = tiny(**settings)
        torch.manual_seed(0)
        model = build_model(config, backend="local", pg_collection=groups)
        optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
        before = {name: parameter.detach().clone() for name, parameter in named_parameters(model)}
        batches = synthetic_batches(config, "mixed")
        gradients = []
        for _ in range(3):
            train_step(config, model, optimizer, scheduler, batches, pg_collection=groups)
            gradients.append({name: parameter.main_grad.clone() for name, parameter in named_parameters(model)})
        return model, optimizer, scheduler, config, before, gradients

    return run


def test_the_update_is_torchs_adamw_with_the_papers_decay(trained):
    """Three steps equal torch's own AdamW on the same gradients: weight_decay 0.1, but none on norms and biases."""
    settings = dict(lr=1e-3, lr_warmup_iters=2, clip_grad=0.0)
    model, _, _, _, weights, gradients = trained(**settings)
    expected = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    decayed = [weight for weight in expected.values() if weight.dim() > 1]
    plain = [weight for weight in expected.values() if weight.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    warm_up = [0.0, 0.5e-3, 1e-3]  # linear over two steps, from 0
    for lr, step in zip(warm_up, gradients, strict=True):
        for group in reference.param_groups:
            group["lr"] = lr
        for name, weight in expected.items():
            weight.grad = step[name].view_as(weight).clone()
        reference.step()
    for name, parameter in named_parameters(model):
        torch.testing.assert_close(parameter.data, expected[name].data, atol=1e-7, rtol=1e-6)


def test_the_decay_is_the_papers_decoupled_form(trained):
    """lambda = 0.1 eta: a weight whose gradient is zero shrinks by (1 - 0.1 eta) a step."""
    model, _, _, _, before, gradients = trained(lr=1e-2, lr_warmup_iters=0, min_lr_ratio=1.0)
    name = "module.language_model.embedding.word_embeddings.weight"
    unused = gradients[0][name].abs().sum(dim=1) == 0  # pieces that do not occur
    after = dict(named_parameters(model))[name].data
    assert unused.sum() > 100
    torch.testing.assert_close(after[unused], before[name][unused] * (1 - 0.1 * 1e-2) ** 3)


def test_warm_up_and_cosine(groups):
    config = tiny(lr=1e-3, lr_warmup_iters=10, connector_lr=8e-5, vision_lr=2e-4)
    model = build_model(config, backend="local", pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
    rates = []
    for _ in range(41):
        rates.append(component_learning_rates(config, optimizer))
        scheduler.step(config.training.global_batch_size)
    for component, peak in {"decoder": 1e-3, "connector": 8e-5, "tower": 2e-4}.items():
        of_component = [rate[component] for rate in rates]
        assert of_component[0] == 0.0
        assert of_component[5] == pytest.approx(peak / 2)
        assert of_component[10] == pytest.approx(peak)
        halfway = 0.1 * peak + 0.9 * peak * 0.5 * (1 + math.cos(math.pi / 2))
        assert of_component[25] == pytest.approx(halfway)
        assert of_component[40] == pytest.approx(0.1 * peak)


def test_a_component_without_a_rate_of_its_own_follows_the_decoder(groups):
    config = tiny(lr=1e-3, lr_warmup_iters=0)
    model = build_model(config, backend="local", pg_collection=groups)
    optimizer, _ = build_optimizer(config, model, pg_collection=groups)
    assert component_learning_rates(config, optimizer) == dict.fromkeys(COMPONENTS, 1e-3)


def test_components_that_are_frozen_at_first_are_left_alone_until_their_steps(groups):
    """Weight decay and gradient norm leave them out too; all others train."""
    config, frozen_steps = tiny(lr=1e-2, lr_warmup_iters=0), {"tower": 2, "decoder": 1}
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, frozen_steps=frozen_steps))
    model = build_model(config, backend="local", pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
    batches = synthetic_batches(config, "mixed")
    for step in range(3):
        before = {name: parameter.detach().clone() for name, parameter in named_parameters(model)}
        statistics = train_step(
            config, model, optimizer, scheduler, batches, pg_collection=groups, with_component_norms=True
        )
        after = dict(named_parameters(model))
        moved = {component_of(name) for name, weight in before.items() if not torch.equal(weight, after[name])}
        norms = statistics.component_grad_norms
        assert moved == {component for component, norm in norms.items() if norm > 0}
        assert moved == {component for component in COMPONENTS if frozen_steps.get(component, 0) <= step}
        assert statistics.grad_norm == pytest.approx(math.hypot(*norms.values()), rel=1e-4)


def test_a_ramp_of_batch_sizes_does_not_move_the_step_that_a_component_begins_with():
    training = dataclasses.replace(
        tiny().training,
        global_batch_size=8,
        batch_size_ramp=(BatchSizeStage(until=2, global_batch_size=4),),
        frozen_steps={"tower": 1, "decoder": 3},
    )
    steps = [frozen_components(training, consumed_sequences=consumed) for consumed in (0, 4, 8, 16)]
    assert steps == [{"tower", "decoder"}, {"decoder"}, {"decoder"}, set()]


def test_every_parameter_belongs_to_a_component(groups):
    model = build_model(tiny(), backend="local", pg_collection=groups)
    assert {component_of(name) for name, _ in named_parameters(model)} == set(COMPONENTS)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(trained, groups):
    model, optimizer, scheduler, config, _, _ = trained(lr=1e-3, lr_warmup_iters=0)
    batches = synthetic_batches(config, "mixed")
    broken = dataclasses.replace(batches[0].images[0], pixels=torch.full_like(batches[0].images[0].pixels, math.nan))
    batches[0] = dataclasses.replace(batches[0], images=(broken,))
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    statistics = train_step(config, model, optimizer, scheduler, batches, pg_collection=groups)
    assert statistics.skipped
    assert math.isnan(statistics.losses.loss)
    for parameter, old in zip(model[0].parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(trained, groups, monkeypatch):
    model, optimizer, scheduler, config, _, _ = trained(lr=1e-3, lr_warmup_iters=0)
    finalize = unwrap(model[0]).config.finalize_model_grads_func

    def poison(*args, **kwargs):
        finalize(*args, **kwargs)
        next(model[0].parameters()).main_grad.flatten()[0] = math.nan

    monkeypatch.setattr(unwrap(model[0]).config, "finalize_model_grads_func", poison)
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    batches = synthetic_batches(config, "mixed")
    statistics = train_step(config, model, optimizer, scheduler, batches, pg_collection=groups)
    assert statistics.skipped
    assert math.isfinite(statistics.losses.loss)
    for parameter, old in zip(model[0].parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_exchanged_images_are_all_others():
    config = tiny()
    batches = [batch for batch in synthetic_batches(config, "mixed") if batch.num_images]
    exchanged = exchange_images(batches)
    true, other = (
        torch.cat([group.pixels for batch in each for group in batch.images]) for each in (batches, exchanged)
    )
    assert len(true) > 3
    assert not any(torch.equal(*pair) for pair in zip(true, other, strict=True))
    key = lambda pixels: sorted(float(image.sum()) for image in pixels)  # noqa: E731
    assert key(true) == key(other)
    for before, after in zip(batches, exchanged, strict=True):
        assert torch.equal(before.tokens, after.tokens)
        assert all(torch.equal(a.slots, b.slots) for a, b in zip(before.images, after.images, strict=True))


def test_exchange_keeps_sizes_apart():
    small, large = (
        ImageGroup(
            slots=torch.zeros(2, 1, dtype=torch.int64), height=size, width=size, pixels=torch.randn(2, 3, size, size)
        )
        for size in (4, 8)
    )
    [batch] = synthetic_batches(
        dataclasses.replace(tiny(), training=dataclasses.replace(tiny().training, global_batch_size=1)), "no image"
    )
    [exchanged] = exchange_images([dataclasses.replace(batch, images=(small, large))])
    for group, before in zip(exchanged.images, (small, large), strict=True):
        assert torch.equal(group.pixels, before.pixels.flip(0))


def test_boundaries_are_cumulative_lengths_of_the_flattened_rows():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    boundaries = Boundaries.of(segments)
    assert boundaries.cu_seqlens.tolist() == [0, 2, 5, 6, 12]
    assert boundaries.max_seqlen == 6


def test_a_window_averages_its_steps_and_knows_every_ranks_images(groups):
    """Three steps on four ranks; the fullest has twice the mean in the first."""
    window = Window(tiny())
    statistics = StepStatistics(LossStatistics((3.0,), (2.0,)), 1.0, component_grad_norms=None, skipped=False)
    for images in ([4, 2, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]):
        window.add(statistics, np.array(images), sequences=2, seconds=2.0, waited=0.5)
    figures = window.figures(3, 6, statistics, dict.fromkeys(COMPONENTS, 1e-3))
    assert figures["image_imbalance"] == pytest.approx((2 + 1 + 1) / 3)
    assert figures["data_wait_ms"] == pytest.approx(500)
    flops = step_flops(tiny().model, seq_length=256, num_sequences=6, num_images=12)
    assert figures["tflops_per_gpu"] == pytest.approx(flops / 6 / 1e12)


def test_the_console_line_keeps_megatrons_names_and_order():
    figures = {
        "iteration": 10,
        "consumed_samples": 80,
        "elapsed_time_per_iteration_ms": 12.5,
        "tflops_per_gpu": 0.5,
        "learning_rate": 1e-3,
        "global_batch_size": 8,
        "lm_loss": 2.5,
        "grad_norm": 1.25,
        "skipped_iterations": 1,
        "nan_iterations": 2,
        "loss captions": 2.0,
        "tokens_per_second": 1000.0,
        "data_wait_ms": 3.0,
    }
    fields = [field.split(":")[0].strip() for field in console_line(figures, train_iters=20).split("] ")[1].split("|")]
    assert [re.sub(r"\s+\d.*", "", field) for field in fields][:12] == [
        "iteration",
        "consumed samples",
        "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)",
        "learning rate",
        "global batch size",
        "lm loss",
        "grad norm",
        "number of skipped iterations",
        "number of nan iterations",
        "loss captions",
        "tokens/s",
    ]
