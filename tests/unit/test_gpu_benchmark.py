"""benchmarks/gpu.py without a GPU: what it would run, what it makes of what it finds, and the peer's arithmetic."""

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_mm1.config import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.data.batch import IGNORE
from megatron_mm1.errors import UserError
from megatron_mm1.planning.flops import decoder_flops, step_flops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DECODER = DecoderConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=128, layernorm_epsilon=1e-6
)
VISION = VisionConfig(
    image_size=32, patch_size=8, num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def slices() -> Any:
    return importlib.import_module("gpu_slices")


# What it would run


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("llava15")])
def test_every_slice_and_variant_can_be_built(name: str, slices: Any, groups: Any) -> None:
    dry_run = importlib.import_module("gpu_dry_run")
    assert dry_run.check(slices.cut(name), list(slices.VARIANTS.values()), pg_collection=groups) == []


def test_a_preset_without_a_plain_model_beside_it_is_refused(slices: Any, groups: Any) -> None:
    dry_run = importlib.import_module("gpu_dry_run")
    (problem,) = dry_run.check(slices.cut("llava15-7b"), list(slices.VARIANTS.values()), pg_collection=groups)
    assert "cannot be made to match this preset's connector" in problem


def test_a_dry_run_tells_a_model_that_is_not_the_planned_one(
    slices: Any, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry_run = importlib.import_module("gpu_dry_run")
    piece = slices.cut("mm1-tiny")
    count = dry_run.count_parameters
    monkeypatch.setattr(dry_run, "count_parameters", lambda model: replace(count(model), output=0))
    monkeypatch.setattr(dry_run, "decoder_flops", lambda *args, **kwargs: 1.0)
    problems = dry_run.check(piece, list(slices.VARIANTS.values()), pg_collection=groups)
    assert len(problems) == 4  # parameters and FLOPs, of both models
    assert "planning counts" in problems[0]


def test_a_dry_run_tells_what_fp8_cannot_take(slices: Any, groups: Any) -> None:
    dry_run = importlib.import_module("gpu_dry_run")
    piece = slices.cut("mm1-tiny")
    config = replace(piece.config, data=replace(piece.config.data, seq_length=257))
    variants = [slices.VARIANTS["fp8_tensorwise"], slices.VARIANTS["bf16"]]
    problems = dry_run.check(replace(piece, config=config), variants, pg_collection=groups)
    assert problems == ["mm1-tiny: fp8_tensorwise: 257 positions are no multiple of 16, which fp8_tensorwise takes"]


def test_slices_keep_widths_and_are_as_deep_as_fits(slices: Any) -> None:
    piece = slices.cut("mm1-30b")
    whole, config = preset("mm1-30b"), piece.config
    assert config.model.vision == whole.model.vision
    assert replace(config.model.decoder, num_layers=48) == whole.model.decoder
    assert (config.data.seq_length, config.data.max_images_per_sequence) == (4096, 16)
    blocks = config.model.decoder.num_layers
    one_more = slices._with_blocks(config, blocks + 1)
    totals = [
        max(slices.Slice("mm1-30b", c).memory(variant).total for variant in slices.VARIANTS.values())
        for c in (config, one_more)
    ]
    assert blocks >= 2
    assert totals[0] <= slices.MEMORY_LIMIT < totals[1]


def test_a_slice_of_experts_has_whole_periods_and_one_rank_s_share(slices: Any) -> None:
    model = slices.cut("mm1-3b-moe").config.model
    assert model.moe == replace(preset("mm1-3b-moe").model.moe, num_moe_experts=8)
    assert model.decoder.num_layers % 2 == 0
    assert slices.cut("mm1-7b-moe").config.model.decoder.num_layers == 4


def test_what_does_not_fit_is_refused_with_its_numbers(slices: Any) -> None:
    with pytest.raises(UserError, match=r"2 decoder blocks of mm1-30b need 6\d\.\d GiB .* 40\.0 GiB are allowed"):
        slices.cut("mm1-30b", limit=40 * 2**30)


@pytest.mark.parametrize("name", ["mm1-tiny", "mm1-7b"])
def test_batches_are_packed_to_the_last_position(name: str, slices: Any) -> None:
    config = slices.cut(name, microbatches=2).config
    first, second = slices.packed_batches(config)
    lengths = slices.example_lengths(config)
    per_image = config.model.connector.tokens_per_image
    assert sum(lengths) == config.data.seq_length
    assert sum(length % 2 for length in lengths) >= 4
    assert not torch.equal(first.tokens, second.tokens)
    assert first.segment_ids[0].unique(return_counts=True)[1].tolist() == list(lengths)
    assert first.num_images == 16
    slots = first.images[0].slots
    assert len(slots.unique()) == slots.numel() == 16 * per_image
    assert torch.equal(first.tokens[0] == slices.IMAGE_ID, torch.isin(torch.arange(config.data.seq_length), slots))
    image_examples = first.segment_ids[0][slots]
    assert image_examples[:, 0].tolist() == [1] * 8 + [2] * 4 + [3] * 2 + [4, 5]
    assert torch.equal(image_examples, image_examples[:, :1].expand_as(image_examples))
    for position in range(config.data.seq_length):
        follows = position + 1 < config.data.seq_length and first.position_ids[0, position + 1] > 0
        trained = follows and first.tokens[0, position + 1] != slices.IMAGE_ID
        assert first.labels[0, position] == (first.tokens[0, position + 1] if trained else IGNORE)


def test_flops_are_those_of_causal_attention_within_examples(slices: Any) -> None:
    piece = slices.cut("mm1-7b", microbatches=3)
    config, lengths = piece.config, slices.example_lengths(piece.config)
    by_example = sum(decoder_flops(config.model, seq_length=length) for length in lengths)
    assert piece.decoder_flops() == pytest.approx(by_example)
    assert piece.step_flops() == pytest.approx(
        step_flops(config.model, seq_length=4096, num_sequences=3, num_images=48, segment_length=piece.segment_length())
    )


def test_jobs_begin_with_all_of_the_first_slice(slices: Any) -> None:
    names = [
        (piece, variant.name)
        for piece, variant in slices.jobs(["30b", "7b", "moe"], [slices.VARIANTS["bf16"], slices.VARIANTS["torch"]])
    ]
    assert names == [
        ("30b", "bf16"), ("30b", "torch"), ("7b", "bf16"), ("moe", "bf16"), ("7b", "torch"), ("moe", "torch")
    ]  # fmt: skip


# The peer


def per_example(lengths: tuple[int, ...]) -> Any:
    return importlib.import_module("gpu_peer_attention").per_example(lengths, torch.device("cpu"))


def test_the_peer_s_decoder_is_llama_on_each_example_alone() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        rms_norm_eps=1e-6,
    )
    llama = LlamaForCausalLM(config)
    peer = importlib.import_module("gpu_peer").PeerDecoder(ModelConfig(decoder=DECODER, vision=VISION))
    state: dict[str, Tensor] = {name.removeprefix("model."): tensor for name, tensor in llama.state_dict().items()}
    for name in ("norm.weight", "lm_head.weight"):
        state[f"head.{name}"] = state.pop(name)
    for layer in range(2):
        attention, mlp = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        state[f"{attention}qkv_proj.weight"] = torch.cat([state.pop(f"{attention}{x}_proj.weight") for x in "qkv"])
        state[f"{mlp}gate_up_proj.weight"] = torch.cat([state.pop(f"{mlp}{x}_proj.weight") for x in ("gate", "up")])
    peer.load_state_dict(state)
    lengths = (7, 13)
    tokens = torch.randint(128, (20,))
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = tokens.roll(-1).index_fill(0, torch.tensor([6, 19]), IGNORE)
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, 64)
    loss = peer(tokens, positions, labels, *none, per_example(lengths))
    expected = sum(llama(part[None], labels=part[None]).loss * (len(part) - 1) for part in tokens.split(list(lengths)))
    torch.testing.assert_close(loss, expected)


def test_the_peer_s_tower_is_clip() -> None:
    torch.manual_seed(1)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    peer = importlib.import_module("gpu_peer").PeerTower(VISION)
    names = {
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "position_embedding",
        "encoder.layers": "layers",
        ".self_attn.out_proj": ".out_proj",
        ".mlp.fc": ".fc",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in clip.state_dict().items():
        if name.endswith("position_ids"):
            continue
        name = name.removeprefix("vision_model.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"layers.{layer}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            state[f"layers.{layer}.qkv_proj.{kind}"] = torch.cat(parts)
    peer.load_state_dict(state)
    pixels = torch.randn(3, 3, 32, 32)
    reference = clip(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    torch.testing.assert_close(peer(pixels), peer.post_layernorm(reference))


def test_the_peer_s_experts_are_those_that_the_router_chose() -> None:
    torch.manual_seed(1)
    moe = MoEConfig(num_moe_experts=4, moe_layer_freq=1)
    model = ModelConfig(decoder=DECODER, vision=VISION, moe=moe)
    experts = importlib.import_module("gpu_peer").PeerExperts(model).bfloat16()
    hidden = torch.randn(40, 64, dtype=torch.bfloat16)
    scores, chosen = experts.gate(hidden).float().topk(2, dim=-1)
    expected = torch.zeros(40, 64)
    for token in range(40):
        for weight, expert in zip(scores[token].softmax(0), chosen[token].tolist(), strict=True):
            gate, up = (hidden[token].float() @ experts.gate_up_proj[expert].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += weight * (inner @ experts.down_proj[expert].float())
    torch.testing.assert_close(experts(hidden).float(), expected, rtol=0.05, atol=1e-4)


def test_a_way_of_attention_is_causal_within_examples() -> None:
    attention = importlib.import_module("gpu_peer_attention")
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 20, 2, 16)
    example = torch.tensor([0] * 7 + [1] * 13)
    mask = (example[:, None] == example).tril()
    reference = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (query, key, value)), attn_mask=mask
    ).transpose(0, 1)
    for way in ("flex", "per_example"):
        attend = attention.WAYS[way]((7, 13), torch.device("cpu"))
        torch.testing.assert_close(attend(query, key, value), reference)


# What it makes of what it finds

KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "gemm",
    "nvjet_qqtst_128x128_128x6_2x1_v_bz_TNN": "gemm",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas": "gemm",  # noqa: E501
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x128x128_cgasize1x2x1_kernel__5x_cublas": "gemm",
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<...>>>": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>": "gemm",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4>": "gemm",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "gemm",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1_cga1x1x1_kernel0_0": "attention",  # noqa: E501
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_27_64x128x128_1x1x1_cga1x1x1": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>": "attention",
    "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<80, 64, 128>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": "attention",
    "triton_tem_fused_flex_attention_backward_zeros_3": "attention",
    "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits<__nv_bfloat16>>": "norm",
    "void transformer_engine::normalization::ln_bwd_finalize_tuned_kernel<...>": "norm",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>": "norm",
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16, float>": "norm",
    "triton_red_fused__fused_rms_norm__to_copy_add_1": "norm",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
    "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32": "convolution",
    "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>": "convolution",
    "void transformer_engine::detail::cast_transpose_optimized_kernel<__nv_bfloat16, __nv_fp8_e4m3>": "quantize",
    "void transformer_engine::block_scaled_1d_cast_transpose_kernel<true, float, __nv_bfloat16>": "quantize",
    "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>": "quantize",
    "void transformer_engine::delayed_scaling_recipe::(anonymous namespace)::kernel_bulk": "quantize",
    "void transformer_engine::multi_tensor_adam::multi_tensor_apply_kernel<AdamFunctorMaster>": "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>": "optimizer",  # noqa: E501
    "void multi_tensor_apply_kernel<TensorListMetadata<1>, transformer_engine::multi_tensor_l2norm::L2NormFunctor<float>>": "optimizer",  # noqa: E501
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>": "elementwise",  # noqa: E501
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "elementwise",
    "void transformer_engine::gated_act_kernel<8, float, transformer_engine::Empty, silu>": "elementwise",
    "void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>(int const*)": "elementwise",
    "_permute_kernel": "elementwise",
    "triton_poi_fused_mul_silu_4": "elementwise",
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel>": "elementwise",
    "Memcpy HtoD (Pageable -> Device)": "memcpy",
    "Memset (Device)": "memcpy",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "other",
}


@pytest.mark.parametrize(("name", "kind"), KERNELS.items())
def test_kernels_are_told_by_their_names(name: str, kind: str) -> None:
    assert importlib.import_module("gpu_kernels").kernel_kind(name) == kind


def event(name: str, category: str, *, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration}


def test_a_trace_gives_time_by_kind_and_the_waits_within_the_step() -> None:
    kernels = importlib.import_module("gpu_kernels")
    events = [
        event(kernels.STEP, "user_annotation", start=100, duration=1000),
        event(kernels.STEP, "gpu_user_annotation", start=110, duration=2000),
        event("nvjet_tst_128x256", "kernel", start=120, duration=3000),
        event("nvjet_tst_64x64", "kernel", start=2000, duration=500),
        event("ncclDevKernel_AllReduce", "kernel", start=2500, duration=200),
        event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", start=2700, duration=4),
        event("cudaMemcpyAsync", "cuda_runtime", start=300, duration=4),
        event("cudaStreamSynchronize", "cuda_runtime", start=310, duration=4),
        event("cudaStreamSynchronize", "cuda_runtime", start=900, duration=4),
        event("cudaDeviceSynchronize", "cuda_runtime", start=1200, duration=4),
        {"ph": "M", "name": "process_name"},
    ]
    profile = kernels.summarize(events)
    assert profile.milliseconds["gemm"] == 3.5
    assert profile.milliseconds["memcpy"] == 0.004
    assert profile.unknown == {"ncclDevKernel_AllReduce": 0.2}
    assert profile.waits == {"cudaStreamSynchronize": 2}
    with pytest.raises(ValueError, match="0 steps and 0 kernels"):
        kernels.summarize([])


def record(milliseconds: float, mfu: float) -> dict[str, Any]:
    part = {"milliseconds": milliseconds, "tflops": 1000 * mfu, "mfu": mfu}
    return {"status": "measured", "step": part, "decoder": part, "tower": part, "peak_memory_gib": 60.0}


def test_goals_are_of_dense_slices_and_need_figures(slices: Any) -> None:
    results = importlib.import_module("gpu_results")
    dense, experts = slices.cut("mm1-30b"), slices.cut("mm1-3b-moe")
    variants = slices.VARIANTS
    rows = [
        (dense, variants["bf16"], record(140.0, 0.48)),
        (dense, variants["fp8_tensorwise"], record(100.0, 0.6)),
        (dense, variants["fp8_delayed"], {"status": "failed", "error": "OutOfMemoryError"}),
        (experts, variants["bf16"], record(1.0, 0.1)),
    ]
    verdicts = {goal.name: goal.holds for goal in results.goals_of(rows)}
    assert verdicts == {
        "decoder_mfu_mm1-30b": False,
        "fp8_speedup_mm1-30b": True,
        "tower_mfu_mm1-30b": True,
        "step_mfu_mm1-30b": True,
    }
    assert not any(goal.holds for goal in results.goals_of([(dense, variants["bf16"], {"status": "not run"})]))


def test_a_card_has_every_figure_and_nothing_that_was_not_measured(slices: Any, tmp_path: Path) -> None:
    results = importlib.import_module("gpu_results")
    piece, variants = slices.cut("mm1-30b"), slices.VARIANTS
    records = [
        (variants["bf16"], {"slice": "mm1-30b", "variant": "bf16", **record(140.0, 0.48)}),
        (variants["torch"], {"status": "not run", "error": "--minutes 8.0 were over"}),
    ]
    machine = {"device": {"name": "a card"}, "versions": {"torch": type("Version", (str,), {})("2.11.0")}}
    content = results.card(piece, records, machine=machine, options={"steps": 10})
    (file,) = results.write_cards(tmp_path, [content])
    read = yaml.safe_load(file.read_text())
    assert file.name == f"mm1-30b-{read['date']}.yaml"
    assert read["variants"]["bf16"]["decoder"]["mfu"] == 0.48
    assert read["variants"]["bf16"]["memory_estimate_gib"] == pytest.approx(64.2, abs=0.1)
    assert set(read["variants"]["torch"]) == {"memory_estimate_gib", "status", "error"}
    assert read["goals"]["fp8_speedup_mm1-30b"] == {"value": None, "bound": 1.35, "holds": False}
    assert read["settings"]["example_lengths"] == list(slices.example_lengths(piece.config))
    assert {"command", "commit", "device", "date"} <= set(read)
    assert read["versions"] == {"torch": "2.11.0"}  # whose type YAML does not know


def test_a_table_shows_dashes_for_what_was_not_measured(slices: Any) -> None:
    results = importlib.import_module("gpu_results")
    piece, variants = slices.cut("mm1-30b"), slices.VARIANTS
    rows = [(piece, variants["bf16"], record(140.0, 0.48)), (piece, variants["torch"], {})]
    _, measured, absent = results.table(rows).splitlines()
    assert measured.split()[:6] == ["mm1-30b", "2", "bf16", f"{piece.step_flops() / 1e12:.1f}", "64.2", "60.0"]
    assert absent.split()[5:] == ["-"] * 7


# Processes


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(output=tmp_path, minutes=8.0, steps=1, warm_up=1, microbatches=1)


def test_a_variant_that_fails_says_why(
    slices: Any, arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu, piece, variant = importlib.import_module("gpu"), slices.cut("mm1-tiny"), slices.VARIANTS["torch"]
    fake = tmp_path / "fake.py"
    monkeypatch.setattr(gpu, "__file__", str(fake))

    fake.write_text("import sys; sys.exit(3)")
    failed = gpu.run_variant(piece, variant, arguments, seconds=60)
    assert failed["status"] == "failed"
    assert "ended with 3" in failed["error"]

    write = 'import pathlib, sys, time; file = pathlib.Path(sys.argv[sys.argv.index("--output") + 1]); '
    fake.write_text(write + """file.write_text('{"status": "running", "peak_memory_gib": 5}'); time.sleep(60)""")
    monkeypatch.setattr(gpu, "SHORTEST_VARIANT", 0)
    hung = gpu.run_variant(piece, variant, arguments, seconds=2)
    assert hung["status"] == "failed"
    assert hung["peak_memory_gib"] == 5  # what it had found until then
    assert "not done after 2 s" in hung["error"]

    monkeypatch.setattr(gpu, "SHORTEST_VARIANT", 30)
    late = gpu.run_variant(piece, variant, arguments, seconds=5)
    assert late["status"] == "not run"
    assert "were over" in late["error"]


def test_an_error_inside_a_variant_is_in_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = importlib.import_module("gpu_measure")

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    monkeypatch.setattr(measure, "gemm_rates", out_of_memory)
    file = tmp_path / "record.json"
    measure.measure_into(file, preset="mm1-tiny", variant="bf16", microbatches=1, steps=1, warm_up=1)
    found = json.loads(file.read_text())
    assert found["status"] == "failed"
    assert found["error"] == "OutOfMemoryError: tried to allocate 5 GiB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("gpu").main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert "gpu_slices" in sys.modules
