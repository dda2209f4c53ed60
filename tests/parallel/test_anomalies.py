"""A step that goes wrong is skipped, gone back from, or ends the run, and is as if it had never been."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest
import torch

from megatron_mm1.config.presets import preset
from megatron_mm1.data.plan import training_data
from megatron_mm1.data.tokenizer import open_tokenizer
from tests.parallel import fault_jobs, saving_jobs
from tests.parallel.jobs import with_parallel

pytestmark = pytest.mark.demo

STEPS = 6
BAD = 4
"""The global batch that goes wrong: of the fifth step."""
LAYOUTS = {
    "DP2, distributed optimizer": ("mm1-tiny", dict(use_distributed_optimizer=True)),
    "PP2": ("mm1-tiny", dict(pipeline_model_parallel_size=2)),
    "EP2, expert biases": ("mm1-tiny-moe", dict(expert_model_parallel_size=2)),
}


def config_of(run_dir, layout="DP2, distributed optimizer", **faults):
    name, sizes = LAYOUTS[layout]
    config = with_parallel(preset(name), **sizes)
    decoder = dataclasses.replace(config.model.decoder, num_layers=2, hidden_size=32, ffn_hidden_size=48)
    model = dataclasses.replace(config.model, decoder=decoder)
    if model.moe is not None:
        moe = dataclasses.replace(
            model.moe, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_layer_freq=1
        )
        model = dataclasses.replace(model, moe=moe)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        model=model,
        training=dataclasses.replace(
            config.training, train_iters=STEPS, eval_interval=0, micro_batch_size=1, global_batch_size=4
        ),
        optimizer=dataclasses.replace(config.optimizer, lr_warmup_iters=1, lr_decay_iters=20),
        checkpoint=dataclasses.replace(config.checkpoint, save_interval=2),
        faults=dataclasses.replace(config.faults, **faults),
        logging=dataclasses.replace(config.logging, log_interval=1, tensorboard=False),
    )


def losses(run_dir):
    """Of each iteration, as it was logged last."""
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return {line["iteration"]: line["lm_loss"] for line in lines if line["kind"] == "train"}


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "faults.jsonl").read_text().splitlines()]


def latest(run_dir):
    return (run_dir / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def expected(pool, demo_corpus, tmp_path_factory):
    """`expected(layout)`: a run in which nothing was ever computed of the bad batch."""
    runs = {}

    def get(layout):
        if layout not in runs:
            runs[layout] = tmp_path_factory.mktemp("expected") / "run"
            pool(2).run(fault_jobs.train, config_of(runs[layout], layout), {BAD: "absent"})
        return runs[layout]

    return get


def assert_equal(pool, run, other, *, step=STEPS):
    """Every bit of weights, optimizer state and step count, and every loss but the bad batch's."""
    name = f"step-{step:08d}"
    [ours], [theirs] = (pool(1).run(saving_jobs.whole, each / "checkpoints" / name) for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    got, wanted = losses(run), losses(other)
    assert [got[step] for step in got if step != BAD + 1] == [wanted[step] for step in got if step != BAD + 1]


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        *itertools.product(["DP2, distributed optimizer"], ["images", "gradient", "spike"]),
        ("PP2", "images"),
        ("EP2, expert biases", "images"),
    ],
)
def test_a_skipped_step_is_as_if_it_had_never_been(pool, expected, tmp_path, layout, fault):
    run = tmp_path / "run"
    config = config_of(run, layout, spike_policy="skip", spike_window=3)
    assert pool(2).run(fault_jobs.train, config, {BAD: fault}) == ["", ""]
    assert_equal(pool, run, expected(layout))
    [event] = events(run)
    assert (event["iteration"], event["global_batch"], event["action"]) == (BAD + 1, BAD, "skip")
    assert (event["loss"] is None) == (fault == "images")
    assert (event["grad_norm"] is None) == (fault != "spike")


def test_the_samples_of_the_batch_are_named(pool, demo_corpus, tmp_path):
    run = tmp_path / "run"
    config = config_of(run)
    pool(2).run(fault_jobs.train, config, {BAD: "gradient"})
    data = training_data(config, tokenizer=open_tokenizer(config.data.tokenizer))
    wanted = {
        (data.sources.names[piece.source], data.sources[piece.source].key(piece.document))
        for sequence in range(4 * BAD, 4 * BAD + 4)
        for piece in data.plan.sequence(sequence)
    }
    named = [(source, key) for source, keys in events(run)[0]["samples"].items() for key in keys]
    assert set(named) == wanted and len(named) == len(wanted)


@pytest.mark.parametrize("fault", ["images", "weights"])
def test_a_rollback_replays_what_came_before_and_passes_the_batch_over(pool, expected, tmp_path, fault):
    """Also where the step before it had broken the weights, which no skip would mend."""
    run = tmp_path / "run"
    where = BAD if fault == "images" else BAD - 1
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=2)
    assert pool(2).run(fault_jobs.train, config, {where: fault}) == ["", ""]
    [event] = events(run)
    assert (event["action"], event["checkpoint"], event["global_batch"]) == ("rollback", "step-00000002", BAD)
    assert_equal(pool, run, expected("DP2, distributed optimizer"))
    assert losses(run)[BAD + 1] is None


def test_a_run_that_was_killed_after_a_rollback_still_passes_the_batch_over(pool, expected, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=2)
    pool(2).run(fault_jobs.train, config, {BAD: "images"})
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / "latest").write_text("step-00000002\n")
    assert pool(2).run(fault_jobs.train, config, {BAD: "images"}) == ["", ""]
    assert len(events(run)) == 1
    assert_equal(pool, run, expected("DP2, distributed optimizer"))


def test_a_rollback_without_a_checkpoint_is_a_skip(pool, demo_corpus, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=2)
    assert pool(2).run(fault_jobs.train, config, {1: "images"}) == ["", ""]
    [event] = events(run)
    assert event["action"] == "skip" and "no checkpoint 2 steps old" in event["what"]


def test_a_stop_saves_and_goes_on_behind_the_batch(pool, expected, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="stop")
    first, second = pool(2).run(fault_jobs.train, config, {BAD: "images"})
    assert first == second
    assert "training ended at iteration 5, which was not applied: the loss is nan (a checkpoint was saved" in first
    assert latest(run) == "step-00000005"
    assert pool(2).run(fault_jobs.train, config, {}) == ["", ""]
    assert_equal(pool, run, expected("DP2, distributed optimizer"))


def test_a_stop_does_not_save_weights_that_are_not_finite(pool, demo_corpus, tmp_path):
    run = tmp_path / "run"
    errors = pool(2).run(fault_jobs.train, config_of(run, nonfinite_policy="stop"), {2: "weights"})
    assert all("are not finite, so nothing was saved" in error for error in errors)
    assert latest(run) == "step-00000002"


def test_skips_in_a_row_end(pool, demo_corpus, tmp_path):
    run = tmp_path / "run"
    faults = {1: "images", 3: "images", 4: "images", 5: "images"}
    errors = pool(2).run(fault_jobs.train, config_of(run, max_consecutive_skips=2), faults)
    assert all("iteration 6, which was not applied: the loss is nan, after 2 steps in a row" in text for text in errors)
    assert [event["action"] for event in events(run)] == ["skip", "skip", "skip", "stop"]


def test_rollbacks_to_the_same_checkpoint_end(pool, demo_corpus, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=3, max_rollbacks=1)
    errors = pool(2).run(fault_jobs.train, config, {4: "images", 5: "images"})
    assert all("the loss is nan, and the run has gone back to step-00000002 as often as" in text for text in errors)
    assert [(event["action"], event["iteration"]) for event in events(run)] == [("rollback", 5), ("stop", 6)]


@pytest.mark.parametrize("sizes", [dict(), dict(tensor_model_parallel_size=2)], ids=["DP2", "TP2"])
def test_a_rank_that_works_longer_is_named_though_all_take_as_long(pool, demo_corpus, tmp_path, sizes):
    """Also where the ranks wait for each other in every layer."""
    config = with_parallel(config_of(tmp_path / "run", straggler_factor=1.5), **sizes)
    pool(2).run(fault_jobs.train, config, {3: "slow"})
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    [slow] = [line for line in lines if line["kind"] == "straggler" and line["iteration"] == 4]
    assert re.match(r"rank \d \(host \S+, pid \d+\)", slow["who"])
    assert slow["seconds"] > slow["median"] + 0.4
