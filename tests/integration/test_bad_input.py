"""What a user can get wrong ends in one clear line and exit code 2, with nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm1.data.tokenizer import train_tokenizer
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.demo

SMALL = (
    *("train", "--preset", "mm1-tiny", "--parallel.tensor_model_parallel_size", "1"),
    *("--training.global_batch_size", "8", "--training.train_iters", "1", "--training.eval_interval", "0"),
    *("--optimizer.lr_warmup_iters", "0", "--optimizer.lr_decay_iters", "10"),
)


def mm1(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_mm1", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("mm1: error: ")]
    assert len(errors) == 1
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.fixture(scope="module")
def trained(demo_corpus, tmp_path_factory) -> Path:
    """A run of one step."""
    run = tmp_path_factory.mktemp("trained") / "run"
    result = mm1(*SMALL, "--run_dir", str(run))
    assert result.returncode == 0, result.stderr[-3000:]
    return run


@pytest.fixture
def other_tokenizer(tmp_path) -> Path:
    path = tmp_path / "other.model"
    train_tokenizer(
        (f"the number {number} is not the number {number + 1}" for number in range(500)), path, vocab_size=300
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--data.seq_lenght", "128"), ("seq_lenght", "data.seq_length")),
        (("--parallel.tensor_model_parallel_size", "3"), ("num_attention_heads 4", "tensor_model_parallel_size 3")),
        (("--parallel.pipeline_model_parallel_size", "2"), ("1",)),
        (
            ("--data.sources", "[{name: a, path: /nowhere, weight: 1}]"),
            ("/nowhere", "mm1 data"),
        ),
        (("--data.tokenizer", "/nowhere/tokenizer.model"), ("/nowhere/tokenizer.model",)),
        (("--checkpoint.load", "/nowhere"), ("no checkpoint at /nowhere",)),
        (("--training.layer_backend", "transformer_engine"), ("no CUDA device", "local")),
        (("--preset", "mm1-tinny"), ("mm1-tinny", "mm1-tiny")),
    ],
    ids=["unknown key", "heads", "world size", "corpus", "tokenizer", "checkpoint", "backend", "preset"],
)
def test_a_mistake_is_named(demo_corpus, tmp_path, arguments, fragments):
    run = tmp_path / "run"
    assert_refused(mm1(*SMALL, "--run_dir", str(run), *arguments), *fragments)
    assert not run.exists()


def test_another_tokenizer_is_refused(trained, other_tokenizer):
    before = sorted(path.name for path in trained.rglob("*"))
    assert_refused(mm1(*SMALL, "--run_dir", str(trained), "--data.tokenizer", str(other_tokenizer)), "wrong tokenizer")
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    [checkpoint] = (run / "checkpoints").glob("step-*")
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    arguments = ("--run_dir", str(run), "--training.train_iters", "2")
    assert_refused(mm1(*SMALL, *arguments), "cannot load checkpoint", checkpoint.name)


def test_another_data_plan_is_refused(trained):
    arguments = ("--run_dir", str(trained), "--data.seed", "7", "--training.train_iters", "2")
    assert_refused(mm1(*SMALL, *arguments), "another data plan", "--checkpoint.accept_other_data true")


def test_another_data_plan_is_taken_where_that_is_asked_for_and_told(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    arguments = ("--run_dir", str(run), "--data.seed", "7", "--training.train_iters", "2")
    result = mm1(*SMALL, *arguments, "--checkpoint.accept_other_data", "true")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "on another data plan than it was trained on, from sequence 8" in result.stdout


def test_a_phase_still_to_come_is_no_other_data_plan(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    phase = "[{step: 1, weights: {captions: 1}}]"
    arguments = ("--run_dir", str(run), "--data.curriculum", phase, "--training.train_iters", "2")
    result = mm1(*SMALL, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 2
    assert [name for name in last if name.startswith("loss ")] == ["loss captions"]
    assert last["epochs captions"] > 0
    assert_refused(mm1(*SMALL, "--run_dir", str(run), "--training.train_iters", "3"), "another data plan")


def test_data_that_ends_before_training_does_is_refused(demo_corpus, tmp_path):
    source = "{name: captions, path: .cache/demo-corpus/prepared/captions/train, max_epochs: 0.01}"
    arguments = ("--run_dir", str(tmp_path / "run"), "--data.sources", f"[{source}]", "--training.train_iters", "500")
    assert_refused(mm1(*SMALL, *arguments), "the data ends after", "raise max_epochs of data.sources")


def test_another_schedule_is_refused(trained):
    arguments = ("--run_dir", str(trained), "--optimizer.lr", "0.5", "--optimizer.lr_decay_iters", "20")
    fragments = ("optimizer.lr was 0.003 and is 0.5", "optimizer.lr_decay_iters was 10 and is 20")
    assert_refused(mm1(*SMALL, *arguments), *fragments)


def test_a_finished_run_does_nothing_more(trained):
    before = (trained / "log.jsonl").read_text()
    result = mm1(*SMALL, "--run_dir", str(trained))
    assert result.returncode == 0 and "nothing is left to train" in result.stdout
    assert (trained / "log.jsonl").read_text() == before


def test_srun_starts_a_rank_by_slurms_variables(demo_corpus, tmp_path):
    """Plain srun sets no RANK; one task of one is enough to see that Slurm's variables are taken."""
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": "29411",
    }
    result = mm1(*SMALL, "--run_dir", str(tmp_path / "run"), environment=slurm)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["iteration"] == 1
