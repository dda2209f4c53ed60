"""LLaVA-1.5's two stages by the commands of docs/llava15.md, step by step against transformers and torch alone."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers
from transformers import AutoImageProcessor, AutoProcessor

from megatron_mm1.cli import main
from megatron_mm1.config import MM1Config
from megatron_mm1.config.loading import load_config
from megatron_mm1.data.plan import training_data
from megatron_mm1.data.tokenizer import open_tokenizer
from megatron_mm1.data.tokenizer.extending import extend_tokenizer
from tests.llava15 import (
    TEMPLATE,
    TEMPLATES,
    PlainLlava,
    Step,
    plain_example,
    plain_examples,
    plain_processor,
    write_parts,
    write_records,
    write_tokenizer,
)
from tests.parallel import jobs
from tests.parallel.test_trainer import records

STEPS, BATCH, WARMUP = 20, 4, 4
LR = {"align": 1e-3, "sft": 1e-3}
"""Of fine-tuning not the recipe's, which would hardly move the loss in 20 steps."""
PIPELINE = ["--pipeline_model_parallel_size", "2"]
TENSOR = ["--tensor_model_parallel_size", "2", "--sequence_parallel"]
TRAINED = {"align": ["multi_modal_projector"], "sft": ["multi_modal_projector", "language_model", "lm_head"]}


def mm1(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@dataclass(frozen=True)
class Work:
    """What the commands before training leave behind.

    Attributes:
        folder: with the parts, the tokenizer and, in `start`, the model imported from the parts: it has no connector.
        examples: of each stage's JSON, by transformers.
    """

    folder: Path
    examples: dict[str, list[dict[str, torch.Tensor]]]

    @property
    def start(self) -> Path:
        return self.folder / "start"

    def config(
        self, stage: str, *, start: Path | None = None, run_dir: str = "unused", options: Sequence[str] = ()
    ) -> MM1Config:
        """That of a stage's training; what it changes of the recipe is the size of things."""
        start = start or self.start
        settings = {
            "checkpoint.load": start,
            "data.sources": f"[{{name: {stage}, path: {self.folder / stage}}}]",
            "data.seq_length": 384,
            "data.num_workers": 0,
            "training.train_iters": STEPS,
            "training.global_batch_size": BATCH,
            "training.micro_batch_size": 2,
            "training.eval_interval": 0,
            "training.precision": "fp32",
            "optimizer.lr_warmup_iters": WARMUP,
            "logging.log_interval": 1,
            "run_dir": self.folder / run_dir,
        }
        if stage == "sft":
            settings["optimizer.lr"] = LR["sft"]
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        return load_config(["--recipe", f"llava15-{stage}", "--config", str(start / "config.yaml"), *words, *options])

    def batches(self, config: MM1Config, stage: str) -> list[list[dict[str, torch.Tensor]]]:
        """The conversations of each step in the order of the run, by transformers."""
        data = training_data(config, tokenizer=open_tokenizer(config.data.tokenizer))
        assert not data.long_documents()  # all are seen whole
        size = config.training.global_batch_size
        return [
            [
                self.examples[stage][int(key.rpartition("#")[2])]
                for sequence in range(first, first + size)
                for key in data.keys([sequence])[stage]
            ]
            for first in range(0, STEPS * size, size)
        ]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("llava15")
    write_parts(folder)
    write_tokenizer(folder / "llama/tokenizer.model")
    extend_tokenizer(folder / "llama/tokenizer.model", folder / "tokenizer.model")
    rows = write_records(folder)
    work = Work(folder, {stage: plain_examples(folder, rows[stage], stage=stage) for stage in rows})
    for stage, template in TEMPLATE.items():
        options = ["--option", f"images={folder / 'images'}", "--option", f"template={TEMPLATES / template}.jinja"]
        reader = ["--reader", "chat", "--input", folder / f"{stage}.json", *options]
        mm1(
            "data",
            "prepare",
            *reader,
            "--tokenizer",
            folder / "tokenizer.model",
            "--output",
            folder / stage,
            "--workers",
            1,
        )
    sources = ["--source", folder / "clip", "--source", folder / "llama", "--tokenizer", folder / "tokenizer.model"]
    preset = ["--preset", "llava15-7b", "--model.connector.tokens_per_image", 16]
    mm1("convert", "import", *sources, "--output", work.start, *preset)
    return work


@pytest.fixture(scope="module")
def projector(pool, work) -> dict[str, torch.Tensor]:
    """What alignment starts from, where the model has no connector yet."""
    [weights] = pool(1).run(jobs.initial_weights, work.config("align"), containing="connector.")
    return {name.rpartition("connector.")[2]: weight for name, weight in weights.items()}


@dataclass(frozen=True)
class Plain:
    """The plain loop's steps of each stage, and its model after each."""

    align: list[Step]
    aligned: PlainLlava
    sft: list[Step]
    tuned: PlainLlava


@pytest.fixture(scope="module")
def plain(work, projector) -> Plain:
    model = PlainLlava(work.folder, projector)
    align = plain_steps(work, model, work.config("align"), "align")
    aligned = deepcopy(model)
    return Plain(align, aligned, plain_steps(work, model, work.config("sft"), "sft"), model)


def plain_steps(work: Work, model: PlainLlava, config: MM1Config, stage: str) -> list[Step]:
    """Of the plain loop, over the conversations that each step of this run has."""
    return list(model.train(work.batches(config, stage), parts=TRAINED[stage], lr=LR[stage], warmup=WARMUP))


@pytest.fixture(scope="module")
def aligned(pool, work) -> Path:
    """A run of alignment, from the parts."""
    return train(pool, work.config("align", run_dir="align"))


@pytest.fixture(scope="module")
def tuned(pool, work, aligned) -> Path:
    """A run of fine-tuning, from that of alignment."""
    return train(pool, work.config("sft", start=aligned, run_dir="sft"))


def train(pool, config: MM1Config, world_size: int = 1) -> Path:
    pool(world_size).run(jobs.train_as_users_do, config)
    return Path(config.run_dir)


def assert_equal(run_dir: Path, expected: list[Step]) -> None:
    ours = records(run_dir, "train")
    assert [record["lm_loss"] for record in ours] == pytest.approx([step.loss for step in expected], abs=1e-4)
    assert [record["grad_norm"] for record in ours] == pytest.approx([step.grad_norm for step in expected], rel=1e-3)
    assert [record["learning_rate connector"] for record in ours] == pytest.approx([step.lr for step in expected])


def test_alignment_from_parts_equals_the_plain_loop(aligned, plain):
    """The connector, which the parts lack, is drawn as training begins."""
    assert_equal(aligned, plain.align)


@pytest.mark.slow
def test_alignment_over_two_stages_equals_the_plain_loop(pool, work, plain, tmp_path):
    """From a checkpoint that has the connector: what a rank draws depends on the layout."""
    config = work.config("align")
    [drawn] = pool(1).run(jobs.save_initial, config, tmp_path / "drawn")
    options = ["--component", "connector", "--from", drawn.parent, "--output", tmp_path / "start"]
    mm1("convert", "replace", "--checkpoint", work.start, *options)
    config = work.config("align", start=tmp_path / "start", run_dir="align-pp2", options=PIPELINE)
    assert_equal(train(pool, config, world_size=2), plain.align)


def test_fine_tuning_equals_the_plain_loop(tuned, plain):
    assert_equal(tuned, plain.sft)


def test_fine_tuning_in_two_tensor_parallel_ranks_equals_the_plain_loop(pool, work, aligned, plain):
    config = work.config("sft", start=aligned, run_dir="sft-tp2", options=TENSOR)
    assert_equal(train(pool, config, world_size=2), plain.sft)


def test_packed_fine_tuning_of_two_replicas_equals_the_plain_loop(pool, work, aligned, plain):
    """Several conversations in a sequence, and so another number of them in each step."""
    config = work.config("sft", start=aligned, run_dir="sft-packed", options=["--data.packing", "mixed"])
    assert min(len(batch) for batch in work.batches(config, "sft")) > BATCH
    expected = plain_steps(work, plain.aligned, config, "sft")
    assert_equal(train(pool, config, world_size=2), expected)


def test_transformers_loads_the_fine_tuned_model(work, tuned, plain):
    exported = work.folder / "exported"
    mm1("convert", "export", "--checkpoint", tuned, "--family", "llava", "--output", exported)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(exported)
    for example in work.examples["sft"]:
        with torch.no_grad():
            got, expected = model(**example).logits, plain.tuned.model(**example).logits
        assert torch.allclose(got, expected, atol=5e-4)
    plain_processor(work.folder, AutoImageProcessor.from_pretrained(exported), stage="sft").save_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    records = json.loads((work.folder / "sft.json").read_text())
    for record, expected in zip(records, work.examples["sft"], strict=True):
        example = plain_example(processor, record, work.folder / "images")
        assert example.keys() == expected.keys()
        assert all(torch.equal(example[name], tensor) for name, tensor in expected.items())
    picture = PIL.Image.open(next(iter((work.folder / "images").rglob("*.png"))))
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "what is red?"}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    said = [{"from": "human", "value": "<image>\nwhat is red?"}, {"from": "gpt", "value": "a"}]
    name = str(Path(picture.filename).relative_to(work.folder / "images"))
    whole = plain_example(processor, {"image": name, "conversations": said}, work.folder / "images")
    ids = torch.as_tensor(asked["input_ids"]).flatten()
    assert torch.equal(ids, whole["input_ids"][0, : len(ids)])
    assert int((whole["labels"][0] != -100).nonzero()[0]) == len(ids)  # and there the answer begins
