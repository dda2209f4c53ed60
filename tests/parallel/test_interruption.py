"""A signal to any rank ends a run on all of them after the same step, with a checkpoint that goes on bit by bit."""

import dataclasses
import json
import signal

import pytest
import torch

from megatron_mm1.checkpoint.format import find_checkpoint, verify_files
from tests.parallel import saving_jobs
from tests.parallel.interrupted import train
from tests.parallel.tiny import tiny_config

pytestmark = pytest.mark.demo


def config(run_dir, *, save_interval=0, train_iters=6):
    base = tiny_config(run_dir, steps=train_iters, tensor_model_parallel_size=2)
    return dataclasses.replace(base, checkpoint=dataclasses.replace(base.checkpoint, save_interval=save_interval))


def losses(run_dir):
    records = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [record["lm_loss"] for record in records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(pool, demo_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert pool(2).run(train, config(folder)) == [(6, 1)] * 2
    return folder


@pytest.mark.parametrize(
    ("rank", "options", "last"),
    [
        (0, dict(step=2), 3),  # agreed on at the next step
        (1, dict(step=2, number=signal.SIGUSR1), 3),
        (1, dict(step=2, in_save=True), 3),
    ],
)
def test_interrupted_and_resumed_is_bit_equal_to_undisturbed(pool, groups, undisturbed, tmp_path, rank, options, last):
    settings = config(tmp_path, save_interval=2 if "in_save" in options else 0)
    saved = 2 if "in_save" in options else 1
    assert pool(2).run(train, settings, rank=rank, **options) == [(last, saved)] * 2
    verify_files(find_checkpoint(tmp_path))
    assert pool(2).run(train, settings)[0][0] == 6
    assert losses(tmp_path) == losses(undisturbed)
    ours, theirs = (saving_jobs.whole(find_checkpoint(folder)) for folder in (tmp_path, undisturbed))
    assert [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])] == []


def test_a_signal_during_the_last_step_changes_nothing(pool, demo_corpus, tmp_path):
    assert pool(2).run(train, config(tmp_path, train_iters=2), rank=1, step=1) == [(2, 1)] * 2
