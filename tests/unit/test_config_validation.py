"""Each rule of validation: the change that breaks it, and the message with the numbers and the fix."""

import pytest

from megatron_mm1.config.keys import all_keys, is_nullable, value_at
from megatron_mm1.config.loading import load_config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.validation import MINIMUM, validate
from megatron_mm1.errors import ConfigError
from tests.overrides import BF16, HEADS, PP, TP, ZERO, problems

BROKEN = [
    # preset, world size, overrides, the one problem (or its beginning)
    (
        "mm1-7b",
        8,
        "--num_query_groups 5",
        "num_attention_heads 32 is not divisible by num_query_groups 5: use 1, 2, 4,",
    ),
    ("mm1-7b", 8, "--tile_indicators true", "data.tile_indicators stand in front of tiles, and data.image_tiling none"),
    (
        "mm1-7b",
        8,
        "--image_tiling dynamic --max_image_tiles 16",
        "data.image_tiling dynamic makes up to 17 images of one, the whole included, and max_images_per_sequence is 16",
    ),
    (
        "mm1-7b",
        8,
        "--image_tiling overview_and_crops --max_images_per_sequence 4",
        "data.image_tiling overview_and_crops makes up to 5 images of one",
    ),
    ("mm1-7b", 8, f"{HEADS} 33", "decoder.hidden_size 4096 is not divisible by num_attention_heads 33"),
    ("mm1-7b", 8, "--kv_channels 127", "the decoder's head dim 127 is odd"),
    ("mm1-7b", 8, "--rope_scaling_factor 0.5", "decoder.rope_scaling_factor 0.5 is too small: use 1 or more, or null"),
    ("mm1-7b", 8, "--model.vision.num_attention_heads 7", "vision.hidden_size 1280 is not divisible by vision.num_att"),
    (
        "mm1-7b",
        8,
        "--image_size 380",
        "vision.image_size 380 is not a multiple of patch_size 14: use image_size 378 or 392",
    ),
    (
        "mm1-7b",
        8,
        "--feature_layer 0",
        "vision.feature_layer 0 is not a layer of a tower of 32: use -1 (the last) to -32",
    ),
    ("mm1-7b", 8, "--feature_layer -33", "vision.feature_layer -33 is not a layer of a tower of 32"),
    (
        "mm1-7b",
        8,
        "--tokens_per_image 150",
        "tokens_per_image 150 is no square, and c_abstractor makes a square grid: use 144 or 169",
    ),
    (
        "mm1-7b",
        8,
        "--tokens_per_image 150 --connector average_pool",
        "tokens_per_image 150 is no square, and average_pool makes a square grid: use 144 or 169",
    ),
    (
        "mm1-tiny",
        2,
        "--patch_size 8 --tokens_per_image 49 --max_images_per_sequence 2",
        "tokens_per_image 49 is more than the tower's 36 patches: use 36 or fewer",
    ),
    (
        "mm1-tiny",
        2,
        "--patch_size 8 --tokens_per_image 50 --max_images_per_sequence 2",
        "tokens_per_image 50 is no square, and c_abstractor makes a square grid: use 36",
    ),
    (
        "mm1-tiny",
        2,
        "--patch_size 8 --tokens_per_image 9 --connector mlp",
        "tokens_per_image 9 is not the tower's 36 patches, and mlp keeps them all: use 36",
    ),
    (
        "mm1-tiny",
        2,
        "--connector attention_pool --model.connector.num_attention_heads 3",
        "connector.hidden_size 128 is not divisible by connector.num_attention_heads 3",
    ),
    ("mm1-tiny-moe", 2, "--moe_z_loss_coeff -1", "moe_z_loss_coeff -1.0 is negative: use 0 or more"),
    (
        "mm1-tiny",
        2,
        '--batch_size_ramp [{"until":10,"global_batch_size":4},{"until":10,"global_batch_size":8}]',
        "the steps `until` of training.batch_size_ramp [10, 10] must be above 0 and increase: put them in order",
    ),
    (
        "mm1-tiny",
        2,
        '--batch_size_ramp [{"until":10,"global_batch_size":0}]',
        "training.batch_size_ramp has batches of 0 sequences: use 1 or more",
    ),
    (
        "mm1-tiny",
        2,
        '--frozen_steps {"towre":10}',
        "training.frozen_steps names towre: its parts are tower, connector, decoder",
    ),
    (
        "mm1-tiny",
        2,
        '--frozen_steps {"tower":0}',
        "training.frozen_steps {'tower': 0} freezes nothing: use 1 or more, or leave the part out",
    ),
    (
        "mm1-tiny",
        2,
        '--frozen_steps {"tower":5} --freeze [tower]',
        "training.frozen_steps and training.freeze both name tower: leave it to one of them",
    ),
    (
        "mm1-tiny",
        2,
        '--frozen_steps {"tower":5,"decoder":9} --freeze [connector]',
        "training.frozen_steps leaves nothing to train in the first 5 steps: leave a part out",
    ),
    (
        "mm1-tiny",
        2,
        '--frozen_steps {"tower":5} --overlap_grad_reduce',
        "parallel.overlap_grad_reduce waits for the gradient of every parameter, and parts in training.frozen_steps",
    ),
    (
        "mm1-tiny",
        2,
        f"--optimizer adafactor {ZERO}",
        "optimizer.optimizer adafactor needs whole rows and columns of each matrix, and "
        "parallel.use_distributed_optimizer cuts matrices anywhere: set it false",
    ),
    ("mm1-tiny", 2, "--adafactor_decay_rate 0.8", "optimizer.adafactor_decay_rate 0.8 is out of range: use -1 to"),
    ("mm1-tiny", 2, "--adafactor_eps 0", "optimizer.adafactor_eps 0.0 is too small: use a positive number"),
    ("mm1-tiny-moe", 2, "--moe_expert_capacity_factor 0", "moe_expert_capacity_factor 0.0 is no multiple of a share"),
    ("mm1-tiny-moe", 2, "--moe_router_topk 1", "moe_router_topk 1 without moe_router_pre_softmax gives every expert"),
    (
        "mm1-tiny-moe",
        2,
        "--moe_router_pre_softmax true --moe_router_score_function sigmoid",
        "moe_router_pre_softmax is about softmax scores, and moe_router_score_function is sigmoid: turn it off",
    ),
    ("mm1-tiny-moe", 2, "--moe_router_enable_expert_bias", "moe_router_enable_expert_bias needs moe_router_score_func"),
    ("mm1-tiny", 2, "--freeze [tower,connector,decoder]", "training.freeze names every part, which leaves nothing"),
    (
        "mm1-tiny",
        2,
        "--tokens_per_image 9 --max_images_per_sequence 30",
        "max_images_per_sequence 30 x tokens_per_image 9 + 2 = 272 positions "
        "do not fit seq_length 256: use seq_length 272 or more, or 28 images or fewer",
    ),
    ("mm1-tiny", 2, "--optimizer.lr 0", "optimizer.lr 0.0 is no rate: use a positive number"),
    ("mm1-tiny", 2, "--optimizer.lr .inf", "optimizer.lr inf is no rate: use a positive number"),
    ("mm1-tiny", 2, "--min_lr_ratio 2", "optimizer.min_lr_ratio 2.0 is a share of the peak: use 0 to 1"),
    ("mm1-tiny", 2, "--adam_beta2 1", "optimizer.adam_beta2 1.0 is out of range: use 0 or more and less than 1"),
    ("mm1-tiny", 2, "--adam_eps 0", "optimizer.adam_eps 0.0 is too small: use a positive number"),
    (
        "mm1-tiny",
        2,
        "--train_iters 100 --lr_warmup_iters 100",
        "lr_warmup_iters 100 is not less than train_iters 100, warm-up included: use 99",
    ),
    (
        "mm1-tiny",
        2,
        "--lr_decay_iters 50 --lr_warmup_iters 100",
        "lr_warmup_iters 100 is not less than lr_decay_iters 50",
    ),
    ("mm1-tiny", 2, "--evaluation.interval 5", "evaluation.interval 5 without a task: name some in evaluation.tasks"),
    ("mm1-tiny", 2, "--evaluation.tasks [coco]", "evaluation.tasks coco without evaluation.interval: say how often"),
    ("mm1-tiny", 2, "--evaluation.shots [0,-4]", "evaluation.shots [0, -4]: give numbers of demonstrations"),
    ("mm1-tiny", 2, '--evaluation.data {"coco":"x"}', "evaluation.data names coco, which is not among"),
    ("mm1-tiny", 2, "--finetune", "checkpoint.finetune takes the weights of checkpoint.load, which is null"),
    (
        "mm1-tiny",
        2,
        "--precision fp32 --tower_recipe fp8_delayed",
        "FP8 layers need training.precision bf16 beside them",
    ),
    (
        "mm1-tiny",
        2,
        f"{BF16} --tower_recipe fp8_delayed --layer_backend local",
        "FP8 layers are Transformer Engine's",
    ),
    (
        "mm1-tiny",
        2,
        f"{BF16} --experts_recipe fp8_delayed",
        "fp8.experts_recipe fp8_delayed needs experts: set model.moe",
    ),
    (
        "mm1-tiny",
        2,
        "--bf16_blocks_at_end 1",
        "fp8.bf16_blocks_at_end 1 excepts blocks from fp8.decoder_recipe, which is bf16",
    ),
    (
        "mm1-tiny",
        2,
        "--fp8_param --use_distributed_optimizer",
        "fp8.fp8_param is about the decoder's FP8 layers, and fp8.decoder_recipe is bf16",
    ),
    (
        "mm1-tiny",
        2,
        f"{BF16} --decoder_recipe fp8_blockwise --bf16_blocks_at_start 2 --bf16_blocks_at_end 2",
        "fp8.bf16_blocks_at_start + bf16_blocks_at_end 4 leave none of the decoder's 4 blocks in FP8",
    ),
    (
        "mm1-tiny",
        2,
        f"{BF16} --decoder_recipe fp8_delayed --bf16_blocks_at_start 1",
        "bf16_blocks_at_start and bf16_blocks_at_end go with every FP8 recipe but fp8_delayed",
    ),
    (
        "mm1-tiny",
        2,
        f"{BF16} --decoder_recipe fp8_tensorwise --fp8_param",
        "fp8.fp8_param needs the float32 weights that parallel.use_distributed_optimizer keeps",
    ),
    (
        "mm1-tiny-moe",
        2,
        f"{BF16} --experts_recipe fp8_delayed",
        "fp8.experts_recipe fp8_delayed within a decoder of bf16 would update its scales after every layer",
    ),
    (
        "mm1-tiny-moe",
        2,
        f"{BF16} {ZERO} --decoder_recipe fp8_tensorwise --experts_recipe fp8_blockwise --fp8_param",
        "fp8.fp8_param keeps weights as fp8.decoder_recipe fp8_tensorwise reads them, and fp8.experts_recipe is fp8_b",
    ),
    (
        "mm1-tiny",
        2,
        f"{BF16} --decoder_recipe fp8_tensorwise --bf16_blocks_at_end 3 {TP} 1 {PP} 2",
        "fp8.bf16_blocks_at_start 0 and bf16_blocks_at_end 3 may be no more than an even share of the blocks",
    ),
]


@pytest.mark.parametrize(("base", "world_size", "arguments", "message"), BROKEN, ids=lambda value: None)
def test_rule_is_told_with_its_numbers_and_the_fix(base: str, world_size: int, arguments: str, message: str) -> None:
    (problem,) = problems(base, arguments, world_size)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model.connector.options", "{depth: 3}", "connector.options {'depth': 3} are for connectors of your own"),
        ("data.sources", "[{name: a, path: b, weight: 0}]", "the weights of data.sources (a) are all 0"),
        ("data.sources", "[{name: a, path: b, weight: -1}]", "the weight -1.0 of source 'a' is not a share"),
        ("data.sources", "[{name: a, path: b}, {name: a, path: c}]", "data.sources has 2 sources named 'a'"),
        ("data.sources", "[{name: a, path: b, max_epochs: 0}]", "max_epochs 0.0 of source 'a' is nothing to train on"),
        ("data.curriculum", "[{step: 0, weights: {text: 1}}]", "the steps of data.curriculum [0] must be above 0"),
        (
            "data.curriculum",
            "[{step: 9, weights: {text: 1}}, {step: 9, weights: {text: 1}}]",
            "the steps of data.curriculum [9, 9] must be above 0 and increase",
        ),
        (
            "data.curriculum",
            "[{step: 9, weights: {text: 1, txt: 1}}]",
            "data.curriculum[0] gives weights to txt, which data.sources (captions, interleaved, questions, text) does",
        ),
        (
            "data.curriculum",
            "[{step: 9, weights: {text: 0}}]",
            "the weights of data.curriculum[0] {'text': 0.0} are no",
        ),
        ("data.packing", "mixed", 'with data.packing "mixed" a sequence holds several sources'),
        ("data.validation", "[{name: a, path: b}, {name: a, path: c}]", "data.validation has 2 sources named 'a'"),
    ],
)
def test_rule_on_a_value_given_as_yaml(option: str, value: str, message: str) -> None:
    config = load_config(["--preset", "mm1-tiny", f"--{option}", value])
    with pytest.raises(ConfigError) as raised:
        validate(config, world_size=2)
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(message)


@pytest.mark.parametrize("path", sorted(MINIMUM))
def test_a_value_below_its_minimum_is_told_and_breaks_no_other_rule(path: str) -> None:
    beside = "--model.lora.alpha 1 --model.lora.decoder_targets [linear_qkv] " if "lora" in path else ""
    (problem,) = problems("mm1-tiny-moe", f"{beside}--{path} {MINIMUM[path] - 1}", 2)
    assert problem.startswith(f"{path} {MINIMUM[path] - 1}") and problem.endswith(f"use {MINIMUM[path]} or more")


def test_every_count_has_a_minimum() -> None:
    counts = {path for path, key in all_keys().items() if key.annotation in (int, int | None)}
    free = {
        "model.vision.feature_layer",
        "parallel.decoder_first_pipeline_num_layers",
        "data.seed",
        "evaluation.seed",
        "training.seed",
    }
    assert counts - set(MINIMUM) == free


def test_all_problems_are_told_at_once() -> None:
    found = problems("mm1-7b", f"{TP} 3 --image_size 380 --lr_warmup_iters 300000 --eval_iters 0 --finetune", 6)
    fragments = ["eval_iters 0", "num_attention_heads 32", "ffn_hidden_size 11008", "vision.image_size 380"]
    fragments += ["vision.num_attention_heads 16", "vision.ffn_hidden_size 5120", "lr_warmup_iters 300000", "finetune"]
    missing = [fragment for fragment in fragments if not any(fragment in problem for problem in found)]
    assert not missing and len(found) == len(fragments)


def test_null_has_no_minimum() -> None:
    nullable = [path for path in MINIMUM if is_nullable(all_keys()[path].annotation)]
    assert nullable and value_at(preset("mm1-tiny"), nullable[0]) is None
