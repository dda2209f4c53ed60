"""Checkpoints move between all layouts bit by bit, are written while training goes on, and fail loudly."""

import json
from pathlib import Path

import pytest
import torch

from megatron_mm1.checkpoint.format import find_checkpoint, verify_files
from tests.parallel import saving_jobs as jobs
from tests.parallel.jobs import with_parallel

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
DISTRIBUTED = "use_distributed_optimizer"
JOURNEYS = {
    "dense": [
        (1, ""),
        (2, DISTRIBUTED),
        (2, "tensor_model_parallel_size=2"),
        (4, f"tensor_model_parallel_size=2 sequence_parallel {DISTRIBUTED}"),
        (2, "pipeline_model_parallel_size=2"),
        (4, f"pipeline_model_parallel_size=2 virtual_pipeline_model_parallel_size=2 {DISTRIBUTED} overlap_grad_reduce"),
        (4, f"context_parallel_size=2 vision_parallel_mode=data {DISTRIBUTED}"),
        (1, DISTRIBUTED),
    ],
    "experts": [
        (1, ""),
        (2, "expert_model_parallel_size=2"),
        (2, f"expert_model_parallel_size=2 {DISTRIBUTED}"),
        (4, f"expert_model_parallel_size=2 {DISTRIBUTED}"),
        (2, "pipeline_model_parallel_size=2"),
        (4, f"tensor_model_parallel_size=2 sequence_parallel expert_model_parallel_size=4 {DISTRIBUTED}"),
        (2, "tensor_model_parallel_size=2 sequence_parallel expert_tensor_parallel_size=2"),
        (1, DISTRIBUTED),
    ],
}
"""Layouts, each of which reads what the one before wrote; with experts some have one optimizer and some two."""


@pytest.mark.parametrize("model", ["dense", "experts", "dense bf16", "experts bf16"])
def test_a_checkpoint_is_the_same_after_a_journey_through_layouts(pool, groups, tmp_path, model):
    journey = JOURNEYS[model.removesuffix(" bf16")]
    world_size, options = journey[0]
    [(path, losses)] = pool(world_size).run(jobs.train_and_save, jobs.config_of(model, options), tmp_path / "first")
    first = jobs.whole(path)
    kinds = {name.split(".")[2] for name in first if name.startswith("optimizer.state.")}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"fp32_param"} if "bf16" in model else set())
    assert first["optimizer_steps"] == 2
    for number, (world_size, options) in enumerate(journey[1:]):
        config = jobs.config_of(model, options)
        path = pool(world_size).run(jobs.save_again, config, path, tmp_path / str(number))[0]
        now = jobs.whole(path)
        assert now.keys() == first.keys()
        assert [name for name, tensor in first.items() if not torch.equal(tensor, now[name])] == [], options
    [(resumed, counted)] = pool(1).run(jobs.resume, jobs.config_of(model), path)
    assert (resumed, counted) == (losses, 2)


RESUMED = {
    "dense": [
        (f"tensor_model_parallel_size=2 {DISTRIBUTED}", "pipeline_model_parallel_size=2"),
        ("pipeline_model_parallel_size=2", DISTRIBUTED),
    ],
    "experts": [
        (f"expert_model_parallel_size=2 {DISTRIBUTED}", "tensor_model_parallel_size=2 sequence_parallel"),
        ("pipeline_model_parallel_size=2", "expert_model_parallel_size=2"),
    ],
}


@pytest.mark.parametrize(
    ("model", "before", "after"), [(model, *pair) for model, pairs in RESUMED.items() for pair in pairs]
)
def test_resuming_in_another_layout(pool, tmp_path, model, before, after):
    (path, losses), _ = pool(2).run(jobs.train_and_save, jobs.config_of(model, before), tmp_path)
    for resumed, counted in pool(2).run(jobs.resume, jobs.config_of(model, after), path):
        assert resumed == pytest.approx(losses, rel=1e-5) and counted == 2


@pytest.mark.parametrize(("name", "world_size"), [("format-1-plain", 1), ("format-1-distributed", 2)])
def test_checkpoints_of_older_formats_go_on(pool, name, world_size):
    """The losses beside the checkpoints are those that the program which wrote them went on with."""
    checkpoint = find_checkpoint(FIXTURES / name)
    config = jobs.read_config(checkpoint)
    expected = json.loads((FIXTURES / name / "expected.json").read_text())["losses"]
    for losses, counted in pool(world_size).run(jobs.resume, config, checkpoint):
        assert losses == pytest.approx(expected, rel=1e-6) and counted == 2


def test_an_old_checkpoint_that_is_bound_to_its_layout_says_so(pool):
    checkpoint = find_checkpoint(FIXTURES / "format-1-distributed")
    config = jobs.read_config(checkpoint)
    config = with_parallel(config, expert_model_parallel_size=2)
    [error, _] = pool(2).run(jobs.error_of_loading, config, checkpoint)
    assert "use_distributed_optimizer was True and is False" in error and "format 1" in error


@pytest.mark.parametrize("options", ["", f"tensor_model_parallel_size=2 {DISTRIBUTED}"])
def test_training_goes_on_while_a_checkpoint_is_written(pool, groups, tmp_path, options):
    """And the checkpoint holds what was there when it was begun."""
    saved = pool(2 if options else 1).run(jobs.save_while_training, jobs.config_of("dense", options), tmp_path, delay=2)
    assert (
        min(rank["steps_meanwhile"] for rank in saved) >= 1
    )  # none where a save waits; how many depends on the machine
    first, second = jobs.whole(saved[0]["reference"]), jobs.whole(saved[0]["path"])
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_old_checkpoints_are_removed_but_the_newest_and_every_nth(pool, tmp_path):
    options = dict(keep_last=2, keep_every=4, asynchronous=True)
    [(said, errors)] = pool(1).run(jobs.save_several, jobs.config_of("dense"), tmp_path, [2, 4, 5, 6, 7], options)
    assert errors == []
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000006", "step-00000007"]
    assert [line for line in said if "removed" in line] == [" removed step-00000002", " removed step-00000005"]


def test_a_step_that_is_saved_again_is_replaced(pool, tmp_path):
    [(_, errors)] = pool(1).run(jobs.save_several, jobs.config_of("dense"), tmp_path, [3, 3], {})
    assert errors == [] and names(tmp_path) == ["latest", "step-00000003"]
    verify_files(find_checkpoint(tmp_path))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(pool, groups, small_disk, asynchronous):
    options = dict(asynchronous=asynchronous, max_failures=1)
    config = jobs.config_of("dense", "tensor_model_parallel_size=2")
    (said, errors), _ = pool(2).run(jobs.save_several, config, small_disk, [1, 2, 3, 4], options)
    assert [line.split(":")[0] for line in said] == [f" saved {small_disk}/step-00000001", " no checkpoint was saved"]
    assert f"{small_disk}/.step-00000002.partial" in said[1] and "No space left on device" in said[1]
    assert "training goes on, 0 more may fail" in said[1]
    [error] = errors
    assert error.startswith(f"UserError: no checkpoint was saved: {small_disk}/.step-00000003.partial")
    assert names(small_disk) == ["latest", "step-00000001"]
    verify_files(find_checkpoint(small_disk))


def test_what_one_rank_could_not_write_is_no_checkpoint_to_any(pool, tmp_path):
    config = jobs.config_of("dense", "tensor_model_parallel_size=2")
    for said, [error] in pool(2).run(jobs.save_where_rank_1_fails, config, tmp_path):
        assert said == [] and "rank 1: OSError: Input/output error" in error
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(pool, tmp_path):
    (tmp_path / "taken").write_text("a file")
    [(said, errors)] = pool(1).run(jobs.save_several, jobs.config_of("dense"), tmp_path / "taken" / "runs", [1], {})
    assert said == [] and len(errors) == 1
    assert "UserError" in errors[0] and str(tmp_path / "taken") in errors[0] and "Not a directory" in errors[0]


def test_random_numbers_go_on(pool, tmp_path):
    config = jobs.config_of("dense", "tensor_model_parallel_size=2")
    for before, after in pool(2).run(jobs.draws_after_resuming, config, tmp_path):
        assert after == before and len(set(before)) == 4
