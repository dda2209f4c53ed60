"""examples/extend: a tower, a connector, a data reader and a task from outside the package, through training, resume
and evaluation.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_mm1.data.tokenizer import train_tokenizer
from tests.conftest import REPOSITORY

EXTEND = REPOSITORY / "examples" / "extend"
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 210, 50)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of coloured squares and pairs.csv, one of whose images is missing."""
    folder = tmp_path_factory.mktemp("extend")
    rows = [("missing.png", "nothing")]
    for number in range(40):
        name, colour = list(COLOURS.items())[number % 4]
        Image.new("RGB", (48 + number, 48), colour).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"a {name} square, number {number}"))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    train_tokenizer((caption for _, caption in rows for _ in range(20)), folder / "tokenizer.model", vocab_size=300)
    return folder


def mm1(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{EXTEND}", "PAIRS": str(folder / "pairs.csv")}
    result = subprocess.run(
        [sys.executable, "-m", "megatron_mm1", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.timeout(400)
def test_own_parts_train_resume_and_are_evaluated(folder):
    output = mm1(
        folder,
        *("data", "prepare", "--reader", "csv_reader.CsvReader", "--input", "pairs.csv"),
        *("--tokenizer", "tokenizer.model", "--output", "prepared"),
    )
    assert "image file missing or unreadable: 1" in output
    assert json.loads((folder / "prepared" / "manifest.json").read_text())

    settings = [
        *("train", "--preset", "mm1-tiny", "--run_dir", "run", "--parallel.tensor_model_parallel_size", "1"),
        *("--parallel.sequence_parallel", "false", "--data.tokenizer", "tokenizer.model"),
        *("--data.sources", "[{name: pairs, path: prepared}]", "--data.validation", "[{name: pairs, path: prepared}]"),
        *("--model.vision.tower", "conv_tower.ConvTower", "--model.connector.connector", "pixel_shuffle.PixelShuffle"),
        *(
            "--model.connector.tokens_per_image",
            "9",
            "--model.connector.options",
            "{factor: 2}",
            "--optimizer.lr_warmup_iters",
            "1",
        ),
        *("--training.global_batch_size", "4", "--training.eval_iters", "1", "--logging.log_interval", "1"),
        *("--optimizer.lr_decay_iters", "4"),
    ]
    mm1(folder, *settings, "--training.train_iters", "2")
    output = mm1(folder, *settings, "--training.train_iters", "4")
    assert "starting from run/checkpoints/step-00000002" in output
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["lm_loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert all(record["grad_norm tower"] > 0 for record in records if record["kind"] == "train")

    mm1(folder, "eval", "--checkpoint", "run", "--task", "caption_match.CaptionMatch", "--output", "eval")
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert "match" in json.dumps(results)


def test_each_example_is_short():
    for path in EXTEND.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name
