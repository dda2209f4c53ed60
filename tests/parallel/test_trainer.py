"""The trainer itself in several layouts, and what its initial weights must be."""

import dataclasses
import itertools
import json
import statistics

import pytest
import torch

from megatron_mm1.config import EvaluationConfig
from megatron_mm1.data.loader import train_batches
from megatron_mm1.data.tokenizer import open_tokenizer
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of

LAYOUTS = {
    "DP2": (2, "mm1-tiny", {}),
    "PP2": (2, "mm1-tiny", dict(pipeline_model_parallel_size=2)),
    "TP2, images shared out": (2, "mm1-tiny", dict(tensor_model_parallel_size=2, vision_parallel_mode="data")),
    "PP2 VPP2": (2, "mm1-tiny", dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "CP2": (2, "mm1-tiny", dict(context_parallel_size=2)),
    "EP2": (2, "mm1-tiny-moe", dict(expert_model_parallel_size=2)),
}
FAST = ("PP2", "TP2, images shared out", "EP2")

pytestmark = pytest.mark.demo


def user_config(name, run_dir, checkpoint=None, **sizes):
    """Two steps with a validation after each, from the weights of `checkpoint`."""
    config = config_of(name, **sizes)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        training=dataclasses.replace(config.training, train_iters=2, eval_interval=1, eval_iters=2),
        optimizer=dataclasses.replace(config.optimizer, lr_decay_iters=10),
        checkpoint=dataclasses.replace(config.checkpoint, load=checkpoint, finetune=checkpoint is not None),
        logging=dataclasses.replace(config.logging, log_interval=1),
    )


def records(run_dir, kind):
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_run_reports_the_same_in_every_layout(pool, demo_corpus, tmp_path, layout):
    """Held-out losses before, between and after two steps, and the steps' own, equal one process."""
    world_size, name, sizes = LAYOUTS[layout]
    [start] = pool(1).run(jobs.save_initial, config_of(name), tmp_path / "start")
    alone, together = tmp_path / "alone", tmp_path / "together"
    pool(1).run(jobs.train_as_users_do, user_config(name, alone, str(start.parent)))
    pool(world_size).run(jobs.train_as_users_do, user_config(name, together, str(start.parent), **sizes))

    expected, got = records(alone, "validation"), records(together, "validation")
    assert [record["iteration"] for record in got] == [0, 1, 2]
    for ours, theirs in zip(got, expected, strict=True):
        assert set(ours) == set(theirs)
        for source in ("captions", "questions", "interleaved", "text"):
            assert ours[source] == pytest.approx(theirs[source], rel=1e-4)
        assert "captions, images exchanged" in ours
    for ours, theirs in zip(records(together, "train"), records(alone, "train"), strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-5)
        assert ours["learning_rate"] == theirs["learning_rate"]
    assert (together / "checkpoints" / "latest").read_text() == "step-00000002\n"


def most_images_over_mean(config, *, dp_size, steps):
    """Of each step, over data-parallel ranks, counted in the batches themselves."""
    tokenizer = open_tokenizer(config.data.tokenizer)
    ranks = [
        train_batches(config, tokenizer=tokenizer, dp_rank=rank, dp_size=dp_size, with_pixels=False)
        for rank in range(dp_size)
    ]
    each = config.training.global_batch_size // (config.training.micro_batch_size * dp_size)
    for _ in range(steps):
        images = [sum(batch.num_images for batch in itertools.islice(batches, each)) for batches in ranks]
        yield max(images) / statistics.mean(images)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_run_reports_how_unevenly_images_are_dealt_to_its_ranks(pool, demo_corpus, tmp_path, dp_size):
    """Pages with all numbers of images, and only two microbatches of them: two ranks cannot make that even."""
    config = user_config("mm1-tiny", tmp_path / "run")
    pages = tuple(source for source in config.data.sources if source.name == "interleaved")
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, micro_batch_size=4),
        data=dataclasses.replace(config.data, sources=pages),
    )
    expected = list(most_images_over_mean(config, dp_size=dp_size, steps=2))
    pool(dp_size).run(jobs.train_as_users_do, config)
    assert [record["image_imbalance"] for record in records(tmp_path / "run", "train")] == pytest.approx(expected)
    assert (max(expected) > 1) == (dp_size > 1)


def test_a_run_evaluates_its_weights(pool, demo_corpus, tmp_path):
    """Before the first step, every second one and after the last; its losses are those of a run that does not."""
    evaluation = EvaluationConfig(interval=2, tasks=("demo_questions",), limit=4)
    steps = {}
    for name, settings in (("alone", EvaluationConfig()), ("evaluated", evaluation)):
        config = dataclasses.replace(user_config("mm1-tiny", tmp_path / name), evaluation=settings)
        training = dataclasses.replace(config.training, train_iters=3, eval_interval=0)
        pool(2).run(jobs.train_as_users_do, dataclasses.replace(config, training=training))
        steps[name] = [record["lm_loss"] for record in records(tmp_path / name, "train")]
    assert steps["evaluated"] == steps["alone"]
    found = records(tmp_path / "evaluated", "evaluation")
    assert [record["iteration"] for record in found] == [0, 2, 3]
    assert all(0 <= record["demo_questions, 0 shots, accuracy"] <= 1 for record in found)
    assert records(tmp_path / "alone", "evaluation") == []


def test_a_finished_run_goes_on_when_it_is_made_longer(pool, demo_corpus, tmp_path):
    config = user_config("mm1-tiny", tmp_path / "run")
    pool(1).run(jobs.train_as_users_do, config)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=4))
    pool(2).run(jobs.train_as_users_do, longer)
    assert [record["iteration"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_every_expert_starts_from_weights_of_its_own(pool):
    config = config_of("mm1-tiny-moe", expert_model_parallel_size=2)
    ranks = pool(2).run(jobs.initial_weights, config, containing="experts")
    experts = [weight for rank in ranks for name, weight in rank.items() if name.endswith("linear_fc1.weight")]
    assert len(experts) == 8  # 2 blocks of 4
    for one, other in itertools.combinations(experts, 2):
        assert not torch.equal(one, other)


def test_ranks_that_share_out_images_start_from_the_same_tower(pool):
    config = config_of("mm1-tiny", tensor_model_parallel_size=2, vision_parallel_mode="data")
    first, second = pool(2).run(jobs.tower_after_unequal_seeds, config)
    assert first == second
