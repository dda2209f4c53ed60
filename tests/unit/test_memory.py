"""Planned memory: beside what an H200 measured, the formulas of pipeline schedules, and counts of whole models.

What ranks really hold is tests/parallel/test_memory.py's.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_mm1.arguments import FAILED
from megatron_mm1.cli import USER_ERROR, main
from megatron_mm1.config.presets import PRESETS, preset
from megatron_mm1.config.schema import ConnectorConfig, Fp8Config, MM1Config, ParallelConfig
from megatron_mm1.errors import ConfigError, UserError
from megatron_mm1.planning.memory import GIB, WORKSPACE, check_memory, plan_memory
from megatron_mm1.planning.parameters import count_parameters
from megatron_mm1.planning.shards import rank_parameters

CARD = Path(__file__).parents[2] / "benchmarks/cards/mm1-30b-2026-11-26.yaml"


def one_process(name: str, *, blocks: int | None = None, precision: str = "bf16", batch: int = 1) -> MM1Config:
    config = preset(name)
    decoder = replace(config.model.decoder, num_layers=blocks or config.model.decoder.num_layers)
    return replace(
        config,
        model=replace(config.model, decoder=decoder),
        parallel=ParallelConfig(),
        training=replace(config.training, precision=precision, global_batch_size=batch, micro_batch_size=1),
    )


def laid_out(config: MM1Config, **sizes: int | bool | str) -> MM1Config:
    return replace(config, parallel=ParallelConfig(**sizes))


def trained(config: MM1Config, **settings: object) -> MM1Config:
    return replace(config, training=replace(config.training, **settings))


@pytest.mark.parametrize(("variant", "recipe"), [("bf16", "bf16"), ("fp8_tensorwise", "fp8_tensorwise")])
def test_the_plan_is_a_little_above_what_a_gpu_measured(variant: str, recipe: str) -> None:
    measured = yaml.safe_load(CARD.read_text())["variants"][variant]["peak_memory_gib"]
    config = replace(
        one_process("mm1-30b", blocks=2, batch=4), fp8=Fp8Config(decoder_recipe=recipe, tower_recipe=recipe)
    )
    (planned,) = plan_memory(config, world_size=1)
    assert measured < planned.total / GIB < 1.15 * measured


@pytest.mark.parametrize("name", PRESETS)
def test_one_rank_holds_the_whole_model(name: str) -> None:
    config = one_process(name)
    assert rank_parameters(config, 0).total == count_parameters(config.model).total


@pytest.mark.parametrize(("precision", "each"), [("bf16", 18), ("fp32", 16)])
def test_bytes_of_a_parameter(precision: str, each: int) -> None:
    config = one_process("mm1-tiny", precision=precision)
    (memory,) = plan_memory(config, world_size=1)
    assert memory.weights + memory.gradients + memory.optimizer == each * count_parameters(config.model).total


def test_pipeline_ranks_share_the_model_out() -> None:
    config = laid_out(one_process("mm1-7b"), pipeline_model_parallel_size=4)
    ranks = [rank_parameters(config, rank) for rank in range(4)]
    assert sum(rank.total for rank in ranks) == count_parameters(config.model).total
    assert [rank.tower > 0 for rank in ranks] == [True, False, False, False]
    assert [rank.embedding > 0 for rank in ranks] == [True, False, False, True]


def test_the_last_rank_has_a_copy_of_tied_embeddings() -> None:
    config = one_process("mm1-tiny")
    decoder = replace(config.model.decoder, untie_embeddings_and_output_weights=False)
    config = laid_out(replace(config, model=replace(config.model, decoder=decoder)), pipeline_model_parallel_size=2)
    first, last = (rank_parameters(config, rank) for rank in range(2))
    assert first.embedding == last.embedding == count_parameters(config.model).embedding


def test_earlier_pipeline_ranks_keep_more_microbatches() -> None:
    config = trained(
        laid_out(one_process("mm1-7b", batch=64), pipeline_model_parallel_size=4), freeze=("tower", "connector")
    )
    pattern = "|".join(["*-" * 8] * 4)
    config = replace(config, parallel=replace(config.parallel, hybrid_layer_pattern=pattern))
    kept = [memory.activations for memory in plan_memory(config, world_size=4)]
    assert kept == [kept[3] * factor for factor in (4, 3, 2, 1)]
    few = plan_memory(trained(config, global_batch_size=2), world_size=4)
    assert [memory.activations for memory in few] == [kept[3] * factor for factor in (2, 2, 2, 1)]


def test_interleaving_keeps_more_in_smaller_pieces() -> None:
    """Megatron-LM's paper on activation recomputation: L (1 + (p - 1) / (p v)) layers' worth on the first rank."""
    config = trained(one_process("mm1-7b", batch=64), freeze=("tower", "connector"))
    ranks, virtual, blocks = 4, 2, 4
    pattern = "|".join(["*-" * blocks] * ranks * virtual)
    sizes = dict(pipeline_model_parallel_size=ranks, virtual_pipeline_model_parallel_size=virtual)
    config = laid_out(config, **sizes, hybrid_layer_pattern=pattern)
    plain = laid_out(config, pipeline_model_parallel_size=ranks, hybrid_layer_pattern="|".join(["*-" * 8] * ranks))
    interleaved, simple = (plan_memory(one, world_size=ranks)[0].activations for one in (config, plain))
    assert interleaved / simple == pytest.approx(1 + (ranks - 1) / (ranks * virtual))


def test_recomputation_keeps_less() -> None:
    config = trained(one_process("mm1-7b"), freeze=("tower", "connector"))
    hidden = config.model.decoder.hidden_size * config.data.seq_length * 2
    (all_kept,) = plan_memory(config, world_size=1)
    by_block = trained(config, recompute_granularity="full", recompute_num_layers=2)
    (full,) = plan_memory(by_block, world_size=1)
    one_block = all_kept.activations // 32
    assert full.activations == 32 * hidden + one_block
    of_mlp = trained(config, recompute_granularity="selective", recompute_modules=("mlp",))
    (selective,) = plan_memory(of_mlp, world_size=1)
    saved = 32 * 3 * config.model.decoder.ffn_hidden_size * config.data.seq_length * 2
    assert all_kept.activations - selective.activations == saved
    half = trained(by_block, recompute_method="block", recompute_num_layers=32)
    feed_forward = 2 * hidden + saved // 32
    largest = max(feed_forward, one_block - feed_forward)
    assert plan_memory(half, world_size=1)[0].activations == 32 * hidden + 16 * one_block + largest


def test_what_is_frozen_has_no_gradients() -> None:
    config = one_process("mm1-tiny")
    counts = count_parameters(config.model)
    (memory,) = plan_memory(trained(config, freeze=("tower", "decoder")), world_size=1)
    assert memory.gradients == 4 * counts.connector
    assert memory.optimizer == 12 * counts.connector
    (whole,) = plan_memory(config, world_size=1)
    assert memory.activations < whole.activations


def test_the_distributed_optimizer_is_shared_by_data_parallel_ranks() -> None:
    config = laid_out(one_process("mm1-3b-moe", batch=16), expert_model_parallel_size=4, use_distributed_optimizer=True)
    rank = rank_parameters(config, 0)
    (memory,) = plan_memory(config, world_size=16)
    assert memory.optimizer == pytest.approx(12 * (rank.dense / 16 + rank.experts / 4))


def test_fp8_weights_take_the_place_of_bf16_ones() -> None:
    config = laid_out(one_process("mm1-7b"), use_distributed_optimizer=True)
    copies = replace(config, fp8=Fp8Config(decoder_recipe="fp8_tensorwise"))
    instead = replace(config, fp8=Fp8Config(decoder_recipe="fp8_tensorwise", fp8_param=True))
    plain, with_copies, without_bf16 = (plan_memory(one, world_size=1)[0] for one in (config, copies, instead))
    decoder = count_parameters(config.model).decoder
    assert with_copies.total - plain.total == without_bf16.fp8_weights == 2 * decoder
    assert plain.weights - without_bf16.weights == 2 * decoder


def test_tensor_and_sequence_parallelism_share_activations() -> None:
    def activations(**sizes: int | bool) -> int:
        config = trained(laid_out(one_process("mm1-7b", batch=4), **sizes), freeze=("tower", "connector"))
        return plan_memory(config, world_size=4)[0].activations

    whole = activations()
    assert activations(tensor_model_parallel_size=4, sequence_parallel=True) * 4 == whole
    assert whole / 4 < activations(tensor_model_parallel_size=4) < whole
    assert activations(context_parallel_size=4) * 4 == whole


def test_a_run_that_cannot_fit_is_refused_with_its_numbers() -> None:
    config = trained(one_process("mm1-7b"), device_memory_gib=80.0)
    with pytest.raises(
        ConfigError, match=r"planned to take 1\d\d\.\d\d GiB \(weights .*training.device_memory_gib is 80: raise"
    ):
        check_memory(config, world_size=1)
    check_memory(trained(config, device_memory_gib=400.0), world_size=1)
    check_memory(trained(config, device_memory_gib=None), world_size=1)


def test_parts_of_your_own_cannot_be_planned() -> None:
    config = one_process("mm1-tiny")
    own = replace(config, model=replace(config.model, connector=ConnectorConfig(connector="a.B", tokens_per_image=4)))
    with pytest.raises(UserError, match="cannot be counted ahead"):
        plan_memory(own, world_size=1)


def test_the_command_prints_every_place_in_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "memory", "--preset", "mm1-30b", "--tensor-model-parallel-size", "8", "--sequence-parallel"]
    arguments += ["--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]
    assert main([*arguments, "--world-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["pipeline", "rank", "in", "all"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "for 64 processes" in lines[-1]
    assert main([*arguments, "--world-size", "64", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [f"{rank['total'] / GIB:.2f}" for rank in written["ranks"]] == [line.split()[1] for line in lines[1:3]]
    assert written["problem"] is None
    assert all(rank["workspace"] > WORKSPACE for rank in written["ranks"])


def test_the_command_fails_where_a_device_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "memory", "--preset", "mm1-7b", "--device-memory-gib"]
    assert main([*arguments, "40"]) == FAILED
    assert "would be refused: a rank at place 0" in capsys.readouterr().out
    assert main([*arguments, "0"]) == USER_ERROR
    assert "training.device_memory_gib 0.0 is no size" in capsys.readouterr().err


def test_training_is_refused_before_anything_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tensor-model-parallel-size", "1", "--vision-parallel-mode", "tensor"]
    folder = tmp_path / "run"
    arguments = ["train", "--preset", "mm1-tiny", *sizes, "--run_dir", str(folder), "--device-memory-gib", "0.5"]
    assert main(arguments) == USER_ERROR
    assert "planned to take 1." in capsys.readouterr().err
    assert not folder.exists()
