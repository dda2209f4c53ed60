"""Which layouts are legal, and what is said of those that are not: the numbers and the fix."""

import pytest

from tests.overrides import BF16, CP, EP, ETP, FIRST, HEADS, PATTERN, PP, SP, TP, VPP, problems

BROKEN = [
    # preset, world size, overrides, the one problem (or its beginning)
    (
        "mm1-7b",
        8,
        f"{HEADS} 20 --kv_channels 128 {TP} 8",
        "num_attention_heads 20 is not divisible by tensor_model_parallel_size 8: use 1, 2, 4, 5, 10 or 20",
    ),
    (
        "mm1-7b",
        8,
        f"--num_query_groups 4 {TP} 8",
        "num_query_groups 4 is not divisible by tensor_model_parallel_size 8: use 1, 2 or 4",
    ),
    (
        "mm1-7b",
        8,
        f"--model.decoder.ffn_hidden_size 44 {TP} 8",
        "ffn_hidden_size 44 is not divisible by tensor_model_parallel_size 8: use 1, 2, 4, 11, 22 or 44",
    ),
    (
        "mm1-7b",
        8,
        f"--model.vision.num_attention_heads 4 {TP} 8",
        "vision.num_attention_heads 4 is not divisible by tensor_model_parallel_size 8: use 1, 2 or 4",
    ),
    (
        "mm1-7b",
        8,
        f"--model.vision.ffn_hidden_size 12 {TP} 8",
        "vision.ffn_hidden_size 12 is not divisible by tensor_model_parallel_size 8: use 1, 2, 3, 4, 6 or 12",
    ),
    ("mm1-tiny", 2, f"{TP} 1 {EP} 2", "expert_model_parallel_size 2 needs experts: set model.moe, or use 1"),
    ("mm1-tiny-moe", 2, "--moe_layer_freq 5", "moe_layer_freq 5 leaves none of the 4 blocks experts: use 4 or less"),
    ("mm1-tiny-moe", 2, "--moe_router_topk 5", "moe_router_topk 5 is more than num_moe_experts 4"),
    (
        "mm1-tiny-moe",
        3,
        f"{EP} 3 --global_batch_size 12",
        "num_moe_experts 4 is not divisible by expert_model_parallel_size 3: use 1, 2 or 4",
    ),
    (
        "mm1-tiny-moe",
        2,
        f"{TP} 2",
        "experts with tensor_model_parallel_size 2 need sequence parallelism: "
        "set parallel.sequence_parallel true, or tensor_model_parallel_size 1",
    ),
    (
        "mm1-tiny-moe",
        2,
        f"{EP} 4",
        "a pipeline stage's 2 processes are not divisible by expert_model_parallel_size 4: use 1 or 2",
    ),
    (
        "mm1-tiny",
        3,
        "",
        "3 processes cannot be split into tensor_model_parallel_size 2: start a multiple of 2, or choose smaller sizes",
    ),
    ("mm1-tiny", 2, f"{PP} 2", "2 processes cannot be split into tensor_model_parallel_size 2 x pipeline"),
    (
        "mm1-tiny",
        4,
        "--global_batch_size 12",
        "global_batch_size 12 is not divisible by micro_batch_size 4 x data-parallel size 2 = 8: use 8 or 16",
    ),
    (
        "mm1-tiny",
        4,
        "--global_batch_size 4",
        "global_batch_size 4 is not divisible by micro_batch_size 4 x data-parallel size 2 = 8: use 8",
    ),
    ("mm1-tiny", 2, f"{SP} {TP} 1", "sequence_parallel needs tensor_model_parallel_size above 1, which is 1"),
    (
        "mm1-tiny",
        2,
        f"{SP} --seq_length 255 --micro_batch_size 1",
        "seq_length 255 x micro_batch_size 1 is not divisible "
        "by tensor_model_parallel_size 2, as sequence_parallel needs: use seq_length 256",
    ),
    (
        "mm1-tiny",
        8,
        f"{PP} 8 {TP} 1",
        "pipeline_model_parallel_size 8 is more than the decoder's 4 blocks, "
        "and each stage holds at least one: use 4 or less",
    ),
    (
        "mm1-tiny",
        4,
        f"{PP} 2 {FIRST} 4",
        "decoder_first_pipeline_num_layers 4 does not leave each of 2 stages one of 4 blocks: use 0 to 3",
    ),
    ("mm1-tiny", 12, f"{PP} 6 {FIRST} 0", "pipeline_model_parallel_size 6 is more than the decoder's 4 blocks"),
    (
        "mm1-tiny",
        4,
        f"{CP} 4 {TP} 2",
        "4 processes cannot be split into tensor_model_parallel_size 2 x context_parallel",
    ),
    (
        "mm1-tiny",
        6,
        f"{CP} 3 --global_batch_size 4",
        "seq_length 256 x micro_batch_size 4 is not divisible by 2 x context_parallel_size 3: use seq_length 258",
    ),
    (
        "mm1-tiny",
        4,
        f"{CP} 2 {SP} --seq_length 253 --micro_batch_size 2",
        "seq_length 253 x micro_batch_size 2 is not divisible by 2 x context_parallel_size 2 and "
        "tensor_model_parallel_size 2, as sequence_parallel needs: use seq_length 254",
    ),
    (
        "mm1-tiny",
        2,
        '--batch_size_ramp [{"until":10,"global_batch_size":6}] --micro_batch_size 4',
        "batch_size_ramp[0].global_batch_size 6 is not divisible by micro_batch_size 4 x data-parallel size 1 = 4: "
        "use 4 or 8",
    ),
    (
        "mm1-tiny",
        4,
        f'{PP} 2 {VPP} 2 --batch_size_ramp [{{"until":10,"global_batch_size":12}}] --global_batch_size 16',
        "3 microbatches per rank are not divisible by pipeline_model_parallel_size 2, as virtual stages need: "
        "use a batch_size_ramp[0].global_batch_size that is a multiple of 8",
    ),
    ("mm1-tiny", 2, f"{VPP} 2", "virtual_pipeline_model_parallel_size 2 needs more than one pipeline rank: use 1"),
    (
        "mm1-tiny",
        4,
        f"{PP} 2 {VPP} 4",
        "pipeline_model_parallel_size 2 x virtual stages 4 is more than the decoder's 4 blocks",
    ),
    (
        "mm1-tiny",
        4,
        f"{PP} 2 {VPP} 2 --global_batch_size 12",
        "3 microbatches per rank are not divisible by pipeline_model_parallel_size 2, as virtual stages need: "
        "use a global_batch_size that is a multiple of 8",
    ),
    (
        "mm1-tiny",
        4,
        f"{PP} 2 {VPP} 2 --eval_iters 3",
        "training.eval_iters 3 is 3 microbatches per rank, not divisible by pipeline_model_parallel_size 2",
    ),
    ("mm1-tiny", 4, f"{PP} 2 {PATTERN} *-*-|*-", "hybrid_layer_pattern '*-*-|*-' is not this decoder: put the bound"),
    ("mm1-tiny", 4, f"{PP} 2 {PATTERN} *-|*-|*-*-", "hybrid_layer_pattern '*-|*-|*-*-' has 3 stages, pipeline_model"),
    ("mm1-tiny", 4, f"{PP} 2 {PATTERN} *-*-*-*-|", "hybrid_layer_pattern '*-*-*-*-|' leaves a stage without layers"),
    ("mm1-tiny", 4, f"{PP} 2 {FIRST} 1 {PATTERN} *-|*-*-*-", "hybrid_layer_pattern says what decoder_first_pipeline"),
    ("mm1-tiny", 2, f"{TP} 1 {ETP} 2", "expert_tensor_parallel_size 2 needs experts: set model.moe, or use 1"),
    (
        "mm1-tiny-moe",
        2,
        f"{EP} 2 {ETP} 2",
        "a pipeline stage's 2 processes are not divisible by expert_model_parallel_size 2 x "
        "expert_tensor_parallel_size 2: use 1 or 2",
    ),
    (
        "mm1-tiny-moe",
        3,
        f"{EP} 1 {ETP} 3 --global_batch_size 12",
        "an expert's width 352 is not divisible by expert_tensor_parallel_size 3",
    ),
    (
        "mm1-tiny",
        2,
        f"{FIRST} 1",
        "decoder_first_pipeline_num_layers 1 needs more than one pipeline stage: leave it null",
    ),
]


@pytest.mark.parametrize(("base", "world_size", "arguments", "message"), BROKEN, ids=lambda value: None)
def test_rule_is_told_with_its_numbers_and_the_fix(base: str, world_size: int, arguments: str, message: str) -> None:
    (problem,) = problems(base, arguments, world_size)
    assert problem.startswith(message)


LEGAL = [
    ("mm1-tiny", 2, ""),
    ("mm1-tiny", 1, f"{TP} 1"),
    ("mm1-tiny", 2, f"{SP} --use_distributed_optimizer --overlap_grad_reduce"),
    ("mm1-tiny", 2, f"{TP} 1 {PP} 2"),
    ("mm1-tiny", 4, f"{PP} 2 {FIRST} 3"),
    ("mm1-tiny", 4, f"{TP} 1 {PP} 4"),
    ("mm1-tiny", 2, f"{TP} 1"),
    ("mm1-tiny", 2, "--untie_embeddings_and_output_weights false"),
    ("mm1-tiny", 2, "--text_only"),
    ("mm1-tiny", 2, "--patch_size 8 --connector mlp --tokens_per_image 36 --max_images_per_sequence 7"),
    ("mm1-tiny", 2, "--connector attention_pool --tokens_per_image 7"),
    ("mm1-tiny", 2, "--connector my.own.Connector --tokens_per_image 11"),
    (
        "mm1-tiny",
        2,
        f"{BF16} --layer_backend transformer_engine --decoder_recipe fp8_blockwise --tower_recipe fp8_delayed",
    ),
    ("mm1-tiny", 2, f"{BF16} --decoder_recipe fp8_tensorwise --bf16_blocks_at_start 1 --bf16_blocks_at_end 1"),
    ("mm1-tiny", 2, f"{BF16} --decoder_recipe fp8_delayed --fp8_param --use_distributed_optimizer"),
    ("mm1-tiny-moe", 2, f"{BF16} --experts_recipe fp8_tensorwise --bf16_blocks_at_start 1"),
    (
        "mm1-tiny-moe",
        2,
        f"{BF16} --decoder_recipe fp8_delayed --experts_recipe fp8_blockwise --tower_recipe fp8_delayed",
    ),
    ("mm1-tiny", 2, "--feature_layer -2 --final_layernorm false"),
    ("mm1-tiny", 2, "--data.sources []"),
    ("mm1-tiny", 2, "--eval_interval 0 --save_interval 0 --clip_grad 0 --weight_decay 0 --lr_warmup_iters 0"),
    ("mm1-tiny-moe", 1, f"{EP} 1"),
    ("mm1-tiny-moe", 2, f"{TP} 2 {SP}"),
    ("mm1-tiny-moe", 4, f"{EP} 2 {PP} 2"),
    ("mm1-30b", 512, f"{TP} 8 {PP} 4 {SP}"),
    ("mm1-3b-moe", 64, f"{EP} 64"),
]


@pytest.mark.parametrize(("base", "world_size", "arguments"), LEGAL)
def test_layout_is_legal(base: str, world_size: int, arguments: str) -> None:
    assert problems(base, arguments, world_size) == ()
