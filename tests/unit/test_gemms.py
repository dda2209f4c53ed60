"""Shapes of a rank's matrix products, and whether FP8 runs them: by hand, by the FLOP model and by real weights."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_mm1.cli import main
from megatron_mm1.config.derived import num_patches, num_vision_blocks, smallest_world_size
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.schema import ConnectorConfig, Fp8Config, Fp8Recipe, MM1Config, ParallelConfig, VisionConfig
from megatron_mm1.config.validation import validate
from megatron_mm1.errors import ConfigError
from megatron_mm1.planning.flops import step_flops
from megatron_mm1.planning.fp8 import assess, fp8_problems, fp8_share
from megatron_mm1.planning.gemms import Gemm, rank_gemms

RECIPES: tuple[Fp8Recipe, ...] = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")
TP8 = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
TP4_EP8 = ParallelConfig(tensor_model_parallel_size=4, expert_model_parallel_size=8, sequence_parallel=True)


def in_fp8(config: MM1Config, recipe: Fp8Recipe, **settings: bool | int) -> MM1Config:
    """Every component by one recipe."""
    fp8 = Fp8Config(decoder_recipe=recipe, tower_recipe=recipe, connector_recipe=recipe, **settings)
    return replace(config, fp8=fp8, training=replace(config.training, precision="bf16"))


def with_data(config: MM1Config, *, seq_length: int, micro_batch_size: int = 1) -> MM1Config:
    return replace(
        config,
        data=replace(config.data, seq_length=seq_length),
        training=replace(config.training, micro_batch_size=micro_batch_size),
    )


def with_decoder(config: MM1Config, **sizes: int) -> MM1Config:
    return replace(config, model=replace(config.model, decoder=replace(config.model.decoder, **sizes)))


def rows_of(config: MM1Config, **options: int) -> list[tuple]:
    """component, name, blocks, per block, M, padded M, N, K, verdict."""
    return [
        (g.component, g.name, g.blocks, g.per_block, g.m, g.padded_m, g.n, g.k, assess(g).kind)
        for g in rank_gemms(config, **options)
    ]


def named(config: MM1Config, component: str, name: str) -> Gemm:
    (gemm,) = [gemm for gemm in rank_gemms(config) if (gemm.component, gemm.name) == (component, name)]
    return gemm


# 16 images of 27 x 27 = 729 patches and a class token: 16 x 729 = 11664 rows, 16 x 730 = 11680 = 730 x 16, which
# fp8_blockwise pads to 92 x 128 = 11776. Connector: 16 x 144 = 2304 = 18 x 128.
def test_mm1_30b_at_tp8_as_computed_by_hand() -> None:
    config = replace(in_fp8(preset("mm1-30b"), "fp8_blockwise"), parallel=TP8)
    assert rows_of(config) == [
        ("tower", "patch_embedding", 1, 1, 11664, 11664, 1280, 588, "bf16"),  # 3 x 14 x 14
        ("tower", "qkv", 32, 1, 11680, 11776, 480, 1280, "padded"),  # 3 x 16 heads x 80 / 8
        ("tower", "proj", 32, 1, 11680, 11776, 1280, 160, "padded"),  # 2 heads x 80
        ("tower", "fc1", 32, 1, 11680, 11776, 640, 1280, "padded"),  # 5120 / 8
        ("tower", "fc2", 32, 1, 11680, 11776, 1280, 640, "padded"),
        ("connector", "stage1.0.conv1", 1, 1, 11664, 11664, 1024, 1280, "bf16"),
        ("connector", "stage1.0.shortcut", 1, 1, 11664, 11664, 1024, 1280, "bf16"),
        ("connector", "stage1.conv", 5, 1, 11664, 11664, 1024, 1024, "bf16"),  # two in each of 3 blocks but for conv1
        ("connector", "stage2.conv", 6, 1, 2304, 2304, 1024, 1024, "bf16"),
        ("connector", "readout.0", 1, 1, 2304, 2304, 7168, 1024, "legal"),
        ("connector", "readout.2", 1, 1, 2304, 2304, 7168, 7168, "legal"),
        ("decoder", "qkv", 48, 1, 4096, 4096, 2688, 7168, "legal"),  # 3 x 56 heads x 128 / 8
        ("decoder", "proj", 48, 1, 4096, 4096, 7168, 896, "legal"),  # 7 heads x 128
        ("decoder", "fc1", 48, 1, 4096, 4096, 4864, 7168, "legal"),  # 2 x 19456 / 8
        ("decoder", "fc2", 48, 1, 4096, 4096, 7168, 2432, "legal"),
        ("output", "output_layer", 1, 1, 4096, 4096, 4000, 7168, "bf16"),  # 32000 / 8
    ]
    assert named(config, "tower", "qkv").waste == pytest.approx(96 / 11776)


# Experts: 4096 positions / TP 4 = 1024 on a rank, each to 2 of 64 experts; 8 ranks send to 8 x 8 experts:
# 8 x 1024 x 2 / 64 = 256 each, padded to a multiple of 16 by 0 to 15 rows: 7.5.
def test_mm1_3b_moe_at_tp4_ep8_as_computed_by_hand() -> None:
    config = in_fp8(preset("mm1-3b-moe"), "fp8_delayed")
    config = replace(config, parallel=replace(TP4_EP8, vision_parallel_mode="data"))
    assert rows_of(config) == [
        ("tower", "patch_embedding", 1, 1, 2916, 2916, 1280, 588, "bf16"),  # 16 images / 4 ranks x 729
        ("tower", "qkv", 32, 1, 2920, 2928, 3840, 1280, "padded"),  # 4 x 730 to 183 x 16; whole layers
        ("tower", "proj", 32, 1, 2920, 2928, 1280, 1280, "padded"),
        ("tower", "fc1", 32, 1, 2920, 2928, 5120, 1280, "padded"),
        ("tower", "fc2", 32, 1, 2920, 2928, 1280, 5120, "padded"),
        ("connector", "stage1.0.conv1", 1, 1, 2916, 2916, 1024, 1280, "bf16"),
        ("connector", "stage1.0.shortcut", 1, 1, 2916, 2916, 1024, 1280, "bf16"),
        ("connector", "stage1.conv", 5, 1, 2916, 2916, 1024, 1024, "bf16"),
        ("connector", "stage2.conv", 6, 1, 576, 576, 1024, 1024, "bf16"),
        ("connector", "readout.0", 1, 1, 576, 576, 3072, 1024, "legal"),  # 4 x 144 = 36 x 16
        ("connector", "readout.2", 1, 1, 576, 576, 3072, 3072, "legal"),
        ("decoder", "qkv", 26, 1, 4096, 4096, 2304, 3072, "legal"),  # 3 x 24 x 128 / 4
        ("decoder", "proj", 26, 1, 4096, 4096, 3072, 768, "legal"),
        ("decoder", "fc1", 13, 1, 4096, 4096, 4096, 3072, "legal"),  # 2 x 8192 / 4, every second block
        ("decoder", "fc2", 13, 1, 4096, 4096, 3072, 2048, "legal"),
        ("experts", "router", 13, 1, 1024, 1024, 64, 3072, "bf16"),
        ("experts", "fc1", 13, 8, 256, 263.5, 16384, 3072, "padded"),  # whole: expert tensor parallelism is 1
        ("experts", "fc2", 13, 8, 256, 263.5, 3072, 8192, "padded"),
        ("output", "output_layer", 1, 1, 4096, 4096, 8000, 3072, "bf16"),
    ]
    split = replace(config, parallel=replace(config.parallel, expert_tensor_parallel_size=2))
    # Twice the ranks send tokens to an expert, of which a rank has half.
    assert [row[4:8] for row in rows_of(split) if row[0] == "experts"][1:] == [
        (512, 519.5, 8192, 3072),
        (512, 519.5, 3072, 4096),
    ]


def layouts(config: MM1Config) -> Iterator[MM1Config]:
    experts = (1, 2, 8) if config.model.moe else (1,)
    modes = itertools.product((1, 2, 4, 8), (1, 2), experts, ("tensor", "data"))
    for tensor, context, expert, vision in modes:
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            sequence_parallel=tensor > 1,
            vision_parallel_mode=vision,
        )
        changed = replace(config, parallel=parallel)
        try:
            validate(changed, world_size=smallest_world_size(parallel))
        except ConfigError:  # more ranks than heads, experts or sequences
            continue
        yield changed


def model_flops(config: MM1Config, *, images: int) -> float:
    """Of a microbatch on all its ranks, what several of them repeat counted once."""
    parallel = config.parallel
    tensor, both = (
        parallel.tensor_model_parallel_size,
        parallel.tensor_model_parallel_size * parallel.context_parallel_size,
    )
    total = 0.0
    for gemm in rank_gemms(config, images=images):
        sharing = both
        if gemm.component in ("tower", "connector") and parallel.vision_parallel_mode == "tensor":
            sharing = tensor if gemm.component == "tower" and gemm.name != "patch_embedding" else 1
        total += gemm.flops * sharing
    return total


def uncounted_flops(config: MM1Config) -> float:
    """Per image, forward and backward: attention, depthwise convolutions and squeeze-excite."""
    vision, connector = config.model.vision, config.model.connector
    patches, inner, tokens = num_patches(vision), connector.hidden_size, connector.tokens_per_image
    total = num_vision_blocks(vision) * 4 * (patches + vision.class_token) ** 2 * vision.hidden_size
    if connector.connector == "attention_pool":
        total += 4 * tokens * patches * inner
    if connector.connector == "c_abstractor":
        channels = [vision.hidden_size] + [inner] * (2 * connector.num_layers - 1)
        total += connector.num_layers * (patches + tokens) * 18 * inner
        total += sum(4 * inner * round(0.25 * width) for width in channels)
    return 3 * total


def check_flops(config: MM1Config) -> None:
    rows = config.training.micro_batch_size
    expected = step_flops(
        config.model, seq_length=config.data.seq_length, num_sequences=rows, num_images=16, segment_length=0
    )
    assert model_flops(config, images=16) == pytest.approx(expected - 16 * uncounted_flops(config), rel=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_flops_are_those_of_the_flop_model_in_every_layout(name: str) -> None:
    config = preset(name)
    if name.startswith("mm1-tiny"):
        config = replace(config, training=replace(config.training, global_batch_size=64))
    tried = list(layouts(config))
    assert len(tried) >= 8
    for layout in tried:
        check_flops(layout)


@pytest.mark.parametrize(
    ("connector", "tokens"), [("average_pool", 144), ("attention_pool", 144), ("mlp", 729), ("c_abstractor", 144)]
)
@pytest.mark.parametrize("width", [1024, 1280])
def test_flops_of_connectors_are_those_of_the_flop_model(connector: str, tokens: int, width: int) -> None:
    config = preset("mm1-3b")
    chosen = ConnectorConfig(connector=connector, tokens_per_image=tokens, hidden_size=width)
    check_flops(replace(config, model=replace(config.model, connector=chosen)))


@pytest.mark.parametrize("name", ["mm1-tiny", "mm1-tiny-moe"])
@pytest.mark.parametrize("connector", ["c_abstractor", "attention_pool", "average_pool", "mlp"])
def test_weights_are_those_of_the_model(name: str, connector: str, groups) -> None:
    from megatron_mm1.model.mm1 import MM1Model

    config = preset(name)
    tokens = 16 if connector == "mlp" else 4
    chosen = replace(config.model.connector, connector=connector, tokens_per_image=tokens, hidden_size=96)
    config = replace(config, parallel=ParallelConfig(), model=replace(config.model, connector=chosen))
    left_out = ("embedding.word_embeddings", "squeeze_excite")
    weights = Counter(
        (parameter.shape[0], parameter.flatten(1).shape[1])
        for path, parameter in MM1Model(config, backend="local", pg_collection=groups).named_parameters()
        if path.endswith(("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"))
        and parameter.dim() > 1
        and not any(part in path for part in left_out)
        and parameter.shape[1:] != (1, 3, 3)  # depthwise
    )
    planned: Counter[tuple[int, int]] = Counter()
    for gemm in rank_gemms(config):
        if gemm.name == "key_value":  # torch's attention has one weight each, and fuses them where widths agree
            planned[gemm.n // 2, gemm.k] += 2
        else:
            planned[gemm.n, gemm.k] += gemm.count
    assert planned == weights


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_in_every_recipe(name: str, recipe: Fp8Recipe) -> None:
    config = in_fp8(preset(name), recipe)
    assert fp8_problems(config) == []
    always = {"patch_embedding", "output_layer", "router"}
    for gemm in rank_gemms(config):
        kind = assess(gemm).kind
        assert (kind == "bf16") == (gemm.name in always or "conv" in gemm.name or "shortcut" in gemm.name)
        if gemm.component in ("tower", "connector") and kind != "bf16":
            multiple = 128 if recipe == "fp8_blockwise" else 16
            assert gemm.padded_m % multiple == 0 and 0 <= gemm.padded_m - gemm.m < multiple
            assert kind == ("padded" if gemm.m % multiple else "legal")
        if gemm.component == "decoder":
            assert kind == "legal"
        if gemm.component == "experts" and kind != "bf16":
            assert (kind, gemm.padded_m - gemm.m) == ("padded", 7.5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_it_is_has_nothing_in_fp8(name: str) -> None:
    gemms = rank_gemms(preset(name))
    assert {assess(gemm).kind for gemm in gemms} == {"bf16"}
    assert all(gemm.padded_m == gemm.m for gemm in gemms)
    assert fp8_share(gemms) == 0


def test_one_image_of_vit_h_is_padded() -> None:
    """730 tokens are 45 x 16 + 10 and 5 x 128 + 90; at TP 16 a rank has one head of 80 = 5 x 16."""
    for recipe, padded in (("fp8_delayed", 736), ("fp8_tensorwise", 736), ("fp8_blockwise", 768)):
        config = replace(in_fp8(preset("mm1-3b"), recipe), parallel=ParallelConfig(tensor_model_parallel_size=16))
        tower = [g for g in rank_gemms(config, images=1) if g.component == "tower"][1:]
        assert {(g.m, g.padded_m) for g in tower} == {(730, padded)}
        assert [(g.n, g.k) for g in tower] == [(240, 1280), (1280, 80), (320, 1280), (1280, 320)]
        assert {assess(g).kind for g in tower} == {"padded"}


def test_ranks_without_images_encode_a_blank_one() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True, vision_parallel_mode="data")
    config = replace(preset("mm1-3b"), parallel=parallel)
    for images, encoded in ((0, 1), (1, 1), (4, 1), (5, 2), (16, 4)):
        assert rank_gemms(config, images=images)[0].m == encoded * 729


def test_siglip_patches_through_an_mlp() -> None:
    """729 tokens an image, no class token: 16 x 729 = 11664 = 729 x 16, in the tower and in both linear layers."""
    config = in_fp8(preset("mm1-7b"), "fp8_tensorwise")
    model = replace(
        config.model,
        vision=VisionConfig(class_token=False, hidden_size=1152, ffn_hidden_size=4304),
        connector=ConnectorConfig(connector="mlp", tokens_per_image=729),
    )
    config = replace(config, model=model)
    assert [(row[1], row[4], row[6], row[7]) for row in rows_of(config) if row[0] == "connector"] == [
        ("linear_1", 11664, 4096, 1152),
        ("linear_2", 11664, 4096, 4096),
    ]
    assert fp8_problems(config) == []  # 4304 = 269 x 16
    split = replace(config, parallel=ParallelConfig(tensor_model_parallel_size=4))
    (problem,) = fp8_problems(split)  # 4304 / 4 = 1076, 4304 / 2 = 2152
    assert "fc1 [1076, 1152], fc2 [1152, 1076]: use tensor_model_parallel_size 1, or fp8.tower_recipe bf16" in problem


def test_query_groups_share_keys_and_values() -> None:
    """32 heads of 128 with 8 groups at TP 4: (32 + 2 x 8) x 128 / 4 = 1536."""
    config = replace(with_decoder(preset("mm1-7b"), num_query_groups=8), parallel=TP4_EP8)
    assert (named(config, "decoder", "qkv").n, named(config, "decoder", "proj").k) == (1536, 1024)
    check_flops(config)


def test_the_vocabulary_is_padded_and_never_in_fp8() -> None:
    config = in_fp8(with_decoder(preset("mm1-3b"), vocab_size=32003), "fp8_delayed")
    output = named(replace(config, parallel=TP8), "output", "output_layer")
    assert (output.n, output.why_bf16) == (32128 // 8, "output layer")


def test_blocks_at_both_ends_stay_in_bf16() -> None:
    """Of 26 blocks 0, 1 and 25 stay; experts are in the odd ones."""
    config = in_fp8(preset("mm1-3b-moe"), "fp8_tensorwise", bf16_blocks_at_start=2, bf16_blocks_at_end=1)
    blocks = {
        (gemm.component, gemm.name, gemm.recipe): gemm.blocks
        for gemm in rank_gemms(config)
        if gemm.component in ("decoder", "experts") and gemm.name != "router"
    }
    expected = {("decoder", "qkv"): (23, 3), ("decoder", "fc1"): (12, 1), ("experts", "fc1"): (11, 2)}
    expected |= {("decoder", "proj"): (23, 3), ("decoder", "fc2"): (12, 1), ("experts", "fc2"): (11, 2)}
    assert blocks == {
        (*where, recipe): count
        for where, counts in expected.items()
        for recipe, count in zip(("fp8_tensorwise", "bf16"), counts, strict=True)
    }


def test_experts_may_differ_from_the_decoder() -> None:
    config = replace(preset("mm1-3b-moe"), parallel=TP4_EP8, fp8=Fp8Config(experts_recipe="fp8_blockwise"))
    kinds = {(g.component, g.name): assess(g).kind for g in rank_gemms(config)}
    assert kinds["decoder", "fc1"] == "bf16" and kinds["experts", "fc1"] == "padded"
    assert fp8_problems(with_data(config, seq_length=4100)) == []  # those positions are multiplied in bf16


def test_blockwise_gathers_that_fall_back_to_bf16_are_told() -> None:
    """4096 / 8 = 512 = 4 x 128 rows on a rank; 4160 / 8 = 520 are no multiple of 128."""
    config = replace(in_fp8(preset("mm1-30b"), "fp8_blockwise"), parallel=TP8)
    assert assess(named(config, "decoder", "qkv")).note == ""
    longer = with_data(config, seq_length=4160)
    assert fp8_problems(longer) == []
    for name in ("qkv", "proj", "fc1", "fc2"):
        assert assess(named(longer, "decoder", name)).note == "520 rows a rank: gathered in bf16"
    assert assess(named(in_fp8(longer, "fp8_delayed"), "decoder", "qkv")).note == ""
    alone = replace(longer, parallel=ParallelConfig())
    assert assess(named(alone, "decoder", "qkv")).note == ""


def test_rows_of_sequence_parallel_ranks_count() -> None:
    """4112 = 257 x 16 positions are legal, but 4112 / 8 = 514 on each of 8 ranks are no multiple of 8."""
    config = with_data(in_fp8(preset("mm1-30b"), "fp8_tensorwise"), seq_length=4112)
    assert fp8_problems(config) == []
    split = replace(config, parallel=TP8)
    kinds = {g.name: assess(g).kind for g in rank_gemms(split) if g.component == "decoder"}
    assert kinds == {"qkv": "illegal", "proj": "legal", "fc1": "illegal", "fc2": "legal"}
    assert len(fp8_problems(split)) == 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seq_length", [2400, 2408, 4100, 4104, 4120])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (4, 2), (8, 1), (1, 4)])
def test_the_length_that_is_named_is_the_next_that_works(
    recipe: Fp8Recipe, seq_length: int, rows: int, tensor: int, context: int
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, context_parallel_size=context, sequence_parallel=tensor > 1
    )

    def of_length(length: int) -> MM1Config:
        config = replace(in_fp8(preset("mm1-7b"), recipe), parallel=parallel)
        config = with_data(config, seq_length=length, micro_batch_size=rows)
        return replace(config, training=replace(config.training, global_batch_size=rows))

    def is_legal(length: int) -> bool:
        positions = length * rows / context
        return positions % 16 == 0 and positions / tensor % 8 == 0

    problems = fp8_problems(of_length(seq_length))
    assert bool(problems) != is_legal(seq_length)
    for problem in problems:
        length = int(problem.split("use data.seq_length ")[1].split(",")[0])
        assert fp8_problems(of_length(length)) == []
        validate(of_length(length), world_size=tensor * context)
        assert not any(is_legal(shorter) for shorter in range(seq_length, length))


@pytest.mark.parametrize("ffn", [2048, 11008, 11016, 11032, 11072, 13184 + 64])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_the_tensor_parallel_sizes_that_are_named_work(ffn: int, tensor: int) -> None:
    config = with_decoder(in_fp8(preset("mm1-7b"), "fp8_delayed"), ffn_hidden_size=ffn)
    config = replace(config, parallel=ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1))
    problems = fp8_problems(config)
    # fc2's K is the smaller of the two: fc1 makes gate and value.
    assert bool(problems) == (ffn // tensor % 16 > 0)
    for problem in problems:
        working = [size for size in (1, 2, 4) if size < tensor and ffn // size % 16 == 0]
        assert ("tensor_model_parallel_size" in problem) == bool(working)
        for size in (1, 2, 4):
            parallel = replace(config.parallel, tensor_model_parallel_size=size, sequence_parallel=size > 1)
            if size in working:
                assert fp8_problems(replace(config, parallel=parallel)) == []
        in_bf16 = replace(config.fp8, decoder_recipe="bf16")
        assert problem.endswith("fp8.decoder_recipe bf16") and fp8_problems(replace(config, fp8=in_bf16)) == []


def test_narrow_experts_name_their_own_size() -> None:
    config = replace(
        in_fp8(preset("mm1-7b-moe"), "fp8_delayed"), parallel=ParallelConfig(expert_tensor_parallel_size=16)
    )
    assert fp8_problems(config) == [
        "fp8.experts_recipe fp8_delayed needs weights whose two sizes on a rank are multiples of 16, and those of "
        "experts are fc2 [4096, 824]: use expert_tensor_parallel_size 1, 2, 4 or 8, or fp8.experts_recipe bf16"
    ]


def test_a_connector_is_not_split() -> None:
    config = in_fp8(preset("mm1-3b"), "fp8_delayed")
    connector = replace(config.model.connector, hidden_size=1000)
    (problem,) = fp8_problems(replace(config, model=replace(config.model, connector=connector), parallel=TP8))
    assert "connector are readout.0 [3072, 1000]: change the widths, or use fp8.connector_recipe bf16" in problem


def test_modules_of_the_users_own_are_not_listed() -> None:
    config = preset("mm1-3b")
    model = replace(
        config.model, vision=VisionConfig(tower="mine.Tower"), connector=ConnectorConfig(connector="mine.Connector")
    )
    assert {g.component for g in rank_gemms(replace(config, model=model))} == {"decoder", "output"}


def test_training_is_refused_before_it_starts() -> None:
    from megatron_mm1.training.trainer import train

    with pytest.raises(ConfigError, match=r"4100 positions on a rank .* use data\.seq_length 4112, or"):
        train(with_data(in_fp8(preset("mm1-3b"), "fp8_delayed"), seq_length=4100))


ON_30B = ["plan", "fp8", "--preset", "mm1-30b", "--fp8.decoder_recipe", "fp8_delayed"]


def test_plan_fp8_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ON_30B, "--tensor-model-parallel-size", "8", "--sequence-parallel", "--world-size", "64"]) == 0
    header, *lines, blank, last = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["component", "product", "times", "M", "padded", "M"]
    config = replace(preset("mm1-30b"), parallel=TP8, fp8=Fp8Config(decoder_recipe="fp8_delayed"))
    assert len(lines) == len(rank_gemms(config))
    (fc2,) = [line.split() for line in lines if line.startswith("decoder") and " fc2 " in line]
    assert fc2 == ["decoder", "fc2", "48", "4096", "7168", "2432", "fp8_delayed", "legal"]
    # The decoder's share by the FLOP model: its blocks without attention over everything.
    blocks = sum(gemm.flops for gemm in rank_gemms(config) if gemm.component == "decoder")
    share = blocks / sum(gemm.flops for gemm in rank_gemms(config))
    assert (blank, last) == ("", f"in FP8: {100 * share:.1f} % of the FLOPs of these products")


def test_plan_fp8_fails_where_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ON_30B, "--seq_length", "4100"]) == 1
    printed = capsys.readouterr().out
    assert "M is no multiple of 16" in printed and "illegal: fp8.decoder_recipe fp8_delayed" in printed
    assert main([*ON_30B, "--seq_length", "4100", "--json"]) == 1
    described = json.loads(capsys.readouterr().out)
    (problem,) = described["problems"]
    assert problem.endswith("use data.seq_length 4112, or fp8.decoder_recipe bf16")
    (qkv,) = [g for g in described["gemms"] if (g["component"], g["name"]) == ("decoder", "qkv")]
    assert (qkv["m"], qkv["n"], qkv["k"], qkv["verdict"]) == (4100, 3 * 7168, 7168, "illegal")


def test_plan_fp8_checks_the_layout_and_counts_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ON_30B, "--tensor-model-parallel-size", "8", "--world-size", "12"]) == 2
    assert "12 processes cannot be split" in capsys.readouterr().err
    assert main([*ON_30B, "--images", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gemms"][0]["m"] == 3 * 729


def test_plan_fp8_says_what_is_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "fp8", "--preset", "mm1-tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[-3:] == ["fp32", "fp32", "recipe"]
