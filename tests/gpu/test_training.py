"""The trainer on one GPU with NCCL: it learns what it learns on the CPU, and either goes on from the other's work."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from megatron_mm1.checkpoint.format import find_checkpoint
from megatron_mm1.parity.workers import Pool
from tests.gpu import jobs
from tests.gpu.corpus import training_config
from tests.gpu.marks import BACKENDS, GPU
from tests.gpu.models import FP8_RECIPES, all_fp8

pytestmark = GPU

PRESETS = ("mm1-tiny", "mm1-tiny-moe")
SAME_RUN = 1e-4
"""Relative difference of losses between two runs of the same kernels, some of which add in any order."""
WITHIN = 0.01
"""Relative difference of a step's loss in bf16 on two kinds of device: the sum over the vocabulary averages
roundings, 2^-8 each; weights drift apart over few steps."""


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Pool]:
    pool = Pool(1, timeout_minutes=3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Pool]:
    """A process that sees no GPU."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        pool = Pool(1, timeout_minutes=3)
        assert pool.run(jobs.device_type) == ["cpu"]  # read while the variable is set
    yield pool
    pool.close()


def starting_from(config, checkpoint, run_dir):
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        checkpoint=dataclasses.replace(config.checkpoint, load=str(checkpoint), finetune=True),
    )


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert weight.dtype == ours[name].dtype and torch.equal(weight, ours[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_losses_are_the_cpus_and_training_goes_on_there(on_gpu, on_cpu, tmp_path, name, backend):
    """Five steps of a bf16 model; the checkpoint they end with loads on the CPU bit by bit, and three more follow."""
    config = training_config(name, tmp_path / "corpus")
    [start] = on_cpu.run(jobs.save_initial, config, tmp_path / "start")
    [(expected, _)] = on_cpu.run(jobs.train, starting_from(config, start, tmp_path / "cpu"), "local")
    gpu_config = starting_from(config, start, tmp_path / "gpu")
    [(losses, weights)] = on_gpu.run(jobs.train, gpu_config, backend)
    assert losses == pytest.approx(expected, rel=WITHIN)

    checkpoint = find_checkpoint(tmp_path / "gpu" / "checkpoints")
    [read] = on_cpu.run(jobs.checkpoint_weights, config, checkpoint)
    assert_same_weights(read, weights)
    longer = dataclasses.replace(gpu_config, training=dataclasses.replace(gpu_config.training, train_iters=8))
    [(losses, _)] = on_cpu.run(jobs.train, longer, "local")
    assert len(losses) == 8
    assert sum(losses[5:]) / 3 < losses[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_of_the_cpu_goes_on_on_the_gpu(on_gpu, on_cpu, tmp_path, backend):
    config = training_config("mm1-tiny", tmp_path / "corpus")
    on_cpu.run(jobs.train, config, "local")
    checkpoint = find_checkpoint(tmp_path / "corpus" / "run" / "checkpoints")
    [read] = on_gpu.run(jobs.checkpoint_weights, config, checkpoint)
    [expected] = on_cpu.run(jobs.checkpoint_weights, config, checkpoint)
    assert_same_weights(read, expected)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=8))
    [(losses, _)] = on_gpu.run(jobs.train, longer, backend)
    assert len(losses) == 8
    assert sum(losses[5:]) / 3 < losses[0]


@pytest.mark.parametrize("fp8_param", [False, True])
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_a_run_in_fp8_goes_on_from_its_checkpoint(on_gpu, tmp_path, recipe, fp8_param):
    """Eight steps with a stop after five are eight steps without one."""
    config = training_config("mm1-tiny", tmp_path / "corpus")
    config = dataclasses.replace(
        all_fp8(recipe, config, fp8_param=fp8_param),
        parallel=dataclasses.replace(config.parallel, use_distributed_optimizer=True),
    )
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=8))
    [(expected, _)] = on_gpu.run(
        jobs.train, dataclasses.replace(longer, run_dir=str(tmp_path / "whole")), "transformer_engine"
    )
    on_gpu.run(jobs.train, config, "transformer_engine")
    [(losses, _)] = on_gpu.run(jobs.train, longer, "transformer_engine")
    assert losses == pytest.approx(expected, rel=SAME_RUN)
