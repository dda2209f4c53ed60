"""Logging to Weights & Biases, offline: figures arrive, and a run that goes on is the same run there."""

import dataclasses

import pytest

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.config.presets import preset
from megatron_mm1.training.logging import RunLogger
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def logging_to_wandb(config, run_dir):
    logging = dataclasses.replace(config.logging, wandb_project="mm1", tensorboard=False)
    return dataclasses.replace(config, logging=logging, run_dir=str(run_dir))


def test_figures_arrive(tmp_path):
    import wandb

    logger = RunLogger(logging_to_wandb(preset("mm1-tiny"), tmp_path), iteration=0, enabled=True)
    logger.record("train", 7, {"loss": 2.5, "nothing": float("nan"), "name": "text"})
    summary = dict(wandb.run.summary)
    logger.close()
    assert summary["train/loss"] == 2.5 and summary["iteration"] == 7
    assert not {"train/nothing", "train/name"} & set(summary)
    assert logger.wandb_run_id and list(tmp_path.glob(f"wandb/offline-run-*-{logger.wandb_run_id}"))


def test_other_ranks_log_nothing(tmp_path):
    logger = RunLogger(logging_to_wandb(preset("mm1-tiny"), tmp_path), iteration=0, enabled=False)
    assert logger.wandb_run_id is None and not list(tmp_path.iterdir())


@pytest.mark.demo
def test_a_run_that_goes_on_is_the_same_run(pool, demo_corpus, tmp_path, monkeypatch):
    config = logging_to_wandb(config_of("mm1-tiny"), tmp_path)
    pool(1).run(jobs.set_environment, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    ids = []
    for iterations in (1, 2):
        training = dataclasses.replace(config.training, train_iters=iterations, eval_interval=0)
        optimizer = dataclasses.replace(config.optimizer, lr_decay_iters=10)
        pool(1).run(jobs.train_as_users_do, dataclasses.replace(config, training=training, optimizer=optimizer))
        metadata = read_metadata(find_checkpoint(tmp_path))
        assert metadata.iteration == iterations
        ids.append(metadata.wandb_run_id)
    assert ids[0] == ids[1] and len(list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}"))) == 2
