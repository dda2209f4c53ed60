"""A step that goes wrong is skipped, gone back from, or ends the run, and is as if it had never been."""

import dataclasses
import json
import re

import pytest
import torch

from megatron_mm1.data.plan import training_data
from megatron_mm1.data.tokenizer import open_tokenizer
from tests.parallel import fault_jobs, saving_jobs
from tests.parallel.jobs import with_parallel
from tests.parallel.tiny import tiny_config

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
    config = tiny_config(run_dir, steps=STEPS, name=name, **sizes)
    if config.model.moe is not None:
        moe = dataclasses.replace(
            config.model.moe, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_layer_freq=1
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    return dataclasses.replace(config, faults=dataclasses.replace(config.faults, **faults))


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
    """`expected(layout, bad batches)`: a run in which nothing was ever computed of these batches."""
    runs = {}

    def get(layout="DP2, distributed optimizer", bad=(BAD,)):
        if (layout, bad) not in runs:
            runs[layout, bad] = run = tmp_path_factory.mktemp("expected") / "run"
            assert pool(2).run(fault_jobs.train, config_of(run, layout), dict.fromkeys(bad, "absent")) == ["", ""]
        return runs[layout, bad]

    return get


def assert_equal(pool, run, other, *, bad=(BAD,)):
    """Every bit of the last weights, optimizer state and step count, and every loss but the bad batches'."""
    name = f"step-{STEPS:08d}"
    [ours], [theirs] = (pool(1).run(saving_jobs.whole, each / "checkpoints" / name) for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    got, wanted, steps = losses(run), losses(other), set(range(1, STEPS + 1)) - {batch + 1 for batch in bad}
    assert [got[step] for step in steps] == [wanted[step] for step in steps]


@pytest.mark.parametrize(
    ("layout", "faults"),
    [
        ("DP2, distributed optimizer", {2: "images", 3: "gradient", 4: "spike"}),
        ("PP2", {4: "images"}),
        ("EP2, expert biases", {4: "images"}),
    ],
)
def test_a_skipped_step_is_as_if_it_had_never_been_and_its_samples_are_named(pool, expected, tmp_path, layout, faults):
    run = tmp_path / "run"
    config = config_of(run, layout, spike_policy="skip", spike_window=2)
    assert pool(2).run(fault_jobs.train, config, faults) == ["", ""]
    assert_equal(pool, run, expected(layout, tuple(faults)), bad=tuple(faults))
    for (batch, fault), event in zip(faults.items(), events(run), strict=True):
        assert (event["iteration"], event["global_batch"], event["action"]) == (batch + 1, batch, "skip")
        assert (event["loss"] is None) == (fault == "images")
        assert (event["grad_norm"] is None) == (fault != "spike")
        named = [(source, key) for source, keys in event["samples"].items() for key in keys]
        assert sorted(named) == sorted(samples(config, batch))


def samples(config, global_batch):
    """(source, key) of every document in a global batch, read from the plan piece by piece."""
    data = training_data(config, tokenizer=open_tokenizer(config.data.tokenizer))
    size = config.training.global_batch_size
    return {
        (data.sources.names[piece.source], data.sources[piece.source].key(piece.document))
        for sequence in range(size * global_batch, size * (global_batch + 1))
        for piece in data.plan.sequence(sequence)
    }


def test_a_rollback_replays_what_came_before_and_passes_the_batch_over(pool, expected, tmp_path):
    """Also where the step before it had broken the weights, which no skip would mend."""
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=2)
    assert pool(2).run(fault_jobs.train, config, {BAD - 1: "weights"}) == ["", ""]
    [event] = events(run)
    assert (event["action"], event["checkpoint"], event["global_batch"]) == ("rollback", "step-00000002", BAD)
    assert_equal(pool, run, expected())
    assert losses(run)[BAD + 1] is None


def test_a_run_that_ends_after_a_rollback_goes_on_from_there_and_still_passes_the_batch_over(pool, expected, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=2)
    faults = {2: "end once gone back", BAD: "images"}
    assert pool(2).run(fault_jobs.train, config, faults) == ["ended on purpose"] * 2
    assert latest(run) == "step-00000002"
    assert pool(2).run(fault_jobs.train, config, {BAD: "images"}) == ["", ""]
    assert len(events(run)) == 1
    assert_equal(pool, run, expected())


def test_a_stop_saves_and_goes_on_behind_the_batch(pool, expected, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="stop")
    first, second = pool(2).run(fault_jobs.train, config, {BAD: "images"})
    assert first == second
    assert "training ended at iteration 5, which was not applied: the loss is nan (a checkpoint was saved" in first
    assert latest(run) == "step-00000005"
    assert pool(2).run(fault_jobs.train, config, {}) == ["", ""]
    assert_equal(pool, run, expected())


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


def test_rollbacks_skip_where_there_is_no_checkpoint_and_end_where_they_do_not_help(pool, demo_corpus, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, nonfinite_policy="rollback", rollback_steps=3, max_rollbacks=1)
    errors = pool(2).run(fault_jobs.train, config, {0: "images", 4: "images", 5: "images"})
    assert all("the loss is nan, and the run has gone back to step-00000002 as often as" in text for text in errors)
    actions = [(event["action"], event["iteration"]) for event in events(run)]
    assert actions == [("skip", 1), ("rollback", 5), ("stop", 6)]
    assert "no checkpoint 3 steps old" in events(run)[0]["what"]


def test_a_rank_that_works_longer_is_named_though_all_take_as_long(pool, demo_corpus, tmp_path):
    """The ranks wait for each other in every layer; to wait for data is work."""
    sizes = dict(tensor_model_parallel_size=2, use_distributed_optimizer=False)
    config = with_parallel(config_of(tmp_path / "run", straggler_factor=1.5), **sizes)
    assert pool(2).run(fault_jobs.train, config, {2: "slow images", 4: "slow data"}) == ["", ""]
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    found = {line["iteration"]: line for line in lines if line["kind"] == "straggler"}
    for iteration, rank in ((3, 1), (5, 0)):
        assert re.match(rf"rank {rank} \(host \S+, pid \d+\)", found[iteration]["who"])
        assert found[iteration]["seconds"] > 0.5
