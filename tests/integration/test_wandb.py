"""Logging to Weights & Biases: figures arrive, a run that goes on is the same run there, and no failure of it ends
training. And what TensorBoard and `mm1 report` show of a run that was killed.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_mm1.checkpoint.format import find_checkpoint, read_metadata
from megatron_mm1.config.presets import preset
from megatron_mm1.config.serialization import to_yaml
from megatron_mm1.report.log import read_log
from megatron_mm1.training.logging import RunLogger
from tests.parallel import jobs
from tests.parallel.test_layouts import config_of
from tests.parallel.tiny import tiny_config


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    with contextlib.suppress(ConnectionError):  # of a service that a test has killed
        wandb.teardown()  # it reads its variables once


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
    config = logging_to_wandb(preset("mm1-tiny"), tmp_path)
    logger = RunLogger(config, iteration=0, enabled=False, wandb_run_id="before")
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
    assert run_ids(tmp_path) == ids and ids[0] == ids[1]


def run_ids(run_dir: Path) -> list[str]:
    """Of the folders `offline-run-TIME-ID`; of the same second, the second one has `-1` behind that."""
    return [re.fullmatch(r"(?:offline-)?run-\w+-(\w+)(?:-\d+)?", path.name)[1] for path in run_dir.glob("wandb/*run-*")]


def failing_logger(tmp_path: Path, capsys, *, run_id: str | None = None) -> tuple[RunLogger, str]:
    """A logger of three records on disk, and what it said."""
    config = logging_to_wandb(preset("mm1-tiny"), tmp_path)
    logger = RunLogger(config, iteration=0, enabled=True, wandb_run_id=run_id)
    for step in (1, 2, 3):
        logger.record("train", step, {"loss": 2.5})
    assert [json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    logger.close()
    return logger, capsys.readouterr().out


def test_without_the_package_the_rest_is_logged(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger, said = failing_logger(tmp_path, capsys, run_id="before")
    assert said.count("Weights & Biases") == 1 and "is not installed" in said
    assert logger.wandb_run_id == "before"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}, "CommError"),
        ({"WANDB_CONFIG_DIR": "{folder}", "NETRC": "{folder}/netrc"}, "nobody is logged in"),
    ],
    ids=["no network", "nobody logged in"],
)
def test_what_cannot_be_sent_stays_on_disk(tmp_path, capsys, monkeypatch, variables, message):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(folder=tmp_path))
    logger, said = failing_logger(tmp_path, capsys)
    assert said.count("Weights & Biases") == 1 and message in said and "wandb sync" in said
    assert list(tmp_path.glob(f"wandb/offline-run-*-{logger.wandb_run_id}/*.wandb"))


def test_a_folder_that_takes_no_files(tmp_path, capsys):
    """Neither online nor offline: the id of before is kept for the next start."""
    (tmp_path / "wandb").write_text("in the way")
    logger, said = failing_logger(tmp_path, capsys, run_id="before")
    assert said.count("Weights & Biases") == 1 and "gets no figures" in said
    assert logger.wandb_run_id == "before"


def test_its_service_dies_meanwhile(tmp_path, capsys):
    logger = RunLogger(logging_to_wandb(preset("mm1-tiny"), tmp_path), iteration=0, enabled=True)
    logger.record("train", 1, {"loss": 2.5})
    run_id = logger.wandb_run_id
    service = [child for child in psutil.Process().children() if "wandb" in child.name()]
    assert service  # of this process: the pool's workers have theirs, which are used again
    for process in service:
        process.kill()
    psutil.wait_procs(service, timeout=30)
    for step in range(2, 30):
        logger.record("train", step, {"loss": 2.5})
        time.sleep(0.02)
    logger.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 29
    assert capsys.readouterr().out.count("Weights & Biases") == 1
    assert logger.wandb_run_id == run_id is not None


def test_it_refuses_to_plot_by_iteration(tmp_path, capsys, monkeypatch):
    """No second run begins beside the one that has."""
    import wandb

    def refuses(*_, **__):
        raise wandb.errors.UsageError("no metric of that name")

    monkeypatch.setattr(wandb.Run, "define_metric", refuses)
    logger, said = failing_logger(tmp_path, capsys)
    assert said.count("Weights & Biases") == 1 and "no metric of that name; it gets no more figures" in said
    assert run_ids(tmp_path) == [logger.wandb_run_id]


def tensorboard_points(run_dir: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run_dir / "tensorboard"))
    shown.Reload()
    return [point.step for point in shown.Scalars(tag)]


@pytest.mark.demo
def test_a_run_that_is_killed_goes_on_under_the_same_id_and_shows_each_step_once(pool, demo_corpus, tmp_path):
    config = logging_to_wandb(tiny_config(tmp_path / "run", steps=40), tmp_path / "run")
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, tensorboard=True))
    run, file, log = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "run" / "log.jsonl"
    file.write_text(to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen([sys.executable, "-m", "megatron_mm1", "train", "--config", file], env=environment)
    latest = run / "checkpoints" / "latest"
    try:
        while not (latest.is_file() and log.read_text().count("\n") > int(latest.read_text().split("-")[1]) + 1):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    saved = read_metadata(find_checkpoint(run))
    before = [json.loads(line)["iteration"] for line in log.read_text().splitlines()]
    last = max(before) + 2
    training = dataclasses.replace(config.training, train_iters=last)
    pool(1).run(jobs.set_environment, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    pool(1).run(jobs.train_as_users_do, dataclasses.replace(config, training=training))
    assert read_metadata(find_checkpoint(run)).wandb_run_id == saved.wandb_run_id is not None
    assert run_ids(run) == 2 * [saved.wandb_run_id]
    assert saved.iteration < max(before)  # so that steps were taken again
    every = list(range(1, last + 1))
    assert sorted(read_log(run).line("train", "lm_loss")) == every
    assert tensorboard_points(run, "train/lm_loss") == every


def test_steps_after_a_rollback_are_shown_once(tmp_path):
    config = preset("mm1-tiny")
    logger = RunLogger(dataclasses.replace(config, run_dir=str(tmp_path)), iteration=0, enabled=True)
    for step in (1, 2, 3):
        logger.record("train", step, {"loss": 2.5})
    logger.go_back(1)
    for step in (2, 3, 4):
        logger.record("train", step, {"loss": 2.0})
    logger.close()
    assert tensorboard_points(tmp_path, "train/loss") == [1, 2, 3, 4]
