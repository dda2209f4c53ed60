"""What is kept for the backward pass, by the bytes that autograd saves, and what frozen parts leave out."""

import dataclasses

import pytest
import torch

from megatron_mm1.config import LoraConfig
from megatron_mm1.config.loading import load_config
from megatron_mm1.parallel.device import device
from megatron_mm1.parity.batches import synthetic_batches
from megatron_mm1.training.build import build_model, build_optimizer, component_of, named_parameters, unwrap
from megatron_mm1.training.freezing import without_gradients
from megatron_mm1.training.step import forward_backward, train_step


def make(*options, preset="mm1-tiny"):
    one_process = ["--tensor_model_parallel_size", "1", "--expert_model_parallel_size", "1"]
    small = ["--data.sources", "[]", "--seq_length", "128", "--micro_batch_size", "2", "--global_batch_size", "2"]
    return load_config(["--preset", preset, *one_process, *small, *options])


def saved_bytes(config, groups) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """(bytes that autograd keeps after the forward pass: of the tower, and in all, each storage once; gradients)."""
    torch.manual_seed(0)
    model = build_model(config, backend="local", pg_collection=groups)
    module = unwrap(model[0])
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    [batch] = synthetic_batches(config, "most images")
    kept: dict[int, int] = {}
    after_tower = 0

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        holding.append(tensor)  # so that no address is used twice
        return tensor

    def tower_is_done(*_):
        nonlocal after_tower
        after_tower = sum(kept.values())

    holding: list[torch.Tensor] = []
    handle = module.tower.register_forward_hook(tower_is_done)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch.to(device()))
    handle.remove()
    total = sum(kept.values())
    holding.clear()
    forward_backward(config, model, [batch], pg_collection=groups)
    gradients = {name: parameter.main_grad.clone() for name, parameter in named_parameters(model)}
    return {"tower": after_tower, "all": total}, gradients


DECODER_CASES = {
    # options, at most this share of the decoder's bytes without recomputation
    "full, block by block": (["--recompute_granularity", "full"], 0.45),
    "full, two blocks at a time": (["--recompute_granularity", "full", "--recompute_num_layers", "4"], 0.44),
    "full, two layers of each stage": (["--recompute_granularity", "full", "--recompute_method", "block"], 0.87),
    "attention": (["--recompute_granularity", "selective"], 0.985),  # SDPA keeps little itself
    "feed-forward": (["--recompute_granularity", "selective", "--recompute_modules", "[mlp]"], 0.75),
    "attention and feed-forward": (
        ["--recompute_granularity", "selective", "--recompute_modules", "[core_attn,mlp]"],
        0.72,
    ),
}


@pytest.mark.parametrize("case", DECODER_CASES)
def test_recomputation_keeps_less_and_changes_no_gradient(groups, case):
    options, share = DECODER_CASES[case]
    before, expected = saved_bytes(make(), groups)
    after, gradients = saved_bytes(make(*options), groups)
    decoder_before, decoder_after = (kept["all"] - kept["tower"] for kept in (before, after))
    assert after["tower"] == before["tower"]
    assert decoder_after <= share * decoder_before, decoder_after / decoder_before
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_the_towers_recomputation_is_its_own(groups):
    before, expected = saved_bytes(make(), groups)
    after, gradients = saved_bytes(make("--vision_recompute", "true"), groups)
    assert after["tower"] <= 0.4 * before["tower"], after["tower"] / before["tower"]
    assert after["all"] - after["tower"] == before["all"] - before["tower"]
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_experts_are_recomputed(groups):
    before, expected = saved_bytes(make(preset="mm1-tiny-moe"), groups)
    options = ["--recompute_granularity", "selective", "--recompute_modules", "[moe]"]
    after, gradients = saved_bytes(make(*options, preset="mm1-tiny-moe"), groups)
    assert after["all"] - after["tower"] <= 0.85 * (before["all"] - before["tower"])
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "frozen", [["tower"], ["connector"], ["decoder"], ["tower", "connector"], ["tower", "decoder"]]
)
def test_frozen_parts_have_no_gradient_no_optimizer_state_and_do_not_move(groups, frozen):
    config = make("--freeze", f"[{','.join(frozen)}]", "--lr_warmup_iters", "0", "--optimizer.lr", "0.01")
    model = build_model(config, backend="local", pg_collection=groups)
    optimizer, scheduler = build_optimizer(config, model, pg_collection=groups)
    before = {name: parameter.detach().clone() for name, parameter in named_parameters(model)}
    batches = synthetic_batches(config, "mixed")
    statistics = train_step(
        config, model, optimizer, scheduler, batches, pg_collection=groups, with_component_norms=True
    )
    assert not statistics.skipped
    of_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named_parameters(model):
        is_frozen = component_of(name) in frozen
        assert hasattr(parameter, "main_grad") != is_frozen
        assert (id(parameter) in of_optimizer) != is_frozen
        assert torch.equal(parameter, before[name]) == is_frozen, name
    trained = {component for component, norm in statistics.component_grad_norms.items() if norm > 0}
    assert trained == {"tower", "connector", "decoder"} - set(frozen)


@pytest.mark.parametrize(("frozen", "kept"), [("[tower]", False), ("[tower,connector]", False), ("[decoder]", True)])
def test_a_frozen_tower_builds_no_graph(groups, frozen, kept):
    model = build_model(make("--freeze", frozen), backend="local", pg_collection=groups)
    module = unwrap(model[0])
    saved: list[int] = []
    inside = False

    def enter(*_):
        nonlocal inside
        inside = True

    def leave(*_):
        nonlocal inside
        inside = False

    module.tower.register_forward_pre_hook(enter)
    module.tower.register_forward_hook(leave)

    def pack(tensor):
        if inside:
            saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = module.encode(torch.randn(2, 3, 48, 48))
    assert bool(saved) == kept
    assert tokens.requires_grad == (frozen != "[tower,connector]")


def test_an_inference_or_validation_pass_builds_no_graph_either(groups):
    config = dataclasses.replace(make())
    model = build_model(config, backend="local", pg_collection=groups)
    with torch.no_grad():
        assert not unwrap(model[0]).encode(torch.randn(1, 3, 48, 48)).requires_grad


def test_a_step_without_gradients_leaves_what_trains_as_it_was(groups):
    """Also where it fails; weights beside adapters, which never train, do not begin to."""
    config = make()
    lora = LoraConfig(rank=4, alpha=8.0, decoder_targets=("linear_proj",))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    model = build_model(config, backend="local", pg_collection=groups)

    def trained():
        return {name for name, parameter in named_parameters(model) if parameter.requires_grad}

    before = trained()
    with pytest.raises(MemoryError), without_gradients(model, {"decoder"}):
        assert trained() == {name for name in before if component_of(name) != "decoder"}
        raise MemoryError
    assert trained() == before < {name for name, _ in named_parameters(model)}
