"""Batched generation on a CPU: our engine against transformers' generate on the same model, exported.

    OMP_NUM_THREADS=1 python benchmarks/generate.py

A model with random weights in float32 is exported as `mm1 convert export --family transformers` does and loaded with
AutoModelForImageTextToText. Prompts of different lengths, each with its own image, are continued greedily in batches of
1, 8 and 32, from text and PNG files to tokens. Theirs is processor and `generate` as its users would call them:
key/value cache, SDPA, padding on the left, inference mode. Ours is `Engine.generate` of an engine that has not seen the
images. Both must give the same tokens. The two take turns in one process (ours, theirs, theirs, ours, ..), and what
counts is the median of the ratios of neighbours.

Goal: as many tokens per second as theirs in every batch size.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from goals import Goal, report
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import megatron_mm1.parallel  # noqa: F401  # before megatron-core is imported
from megatron_mm1.checkpoint.tensors import StateDict, collect
from megatron_mm1.checkpoint.transformers_export import export_transformers
from megatron_mm1.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    MM1Config,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.data.records import Image, Text
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.requests import Generation, GenerationRequest
from megatron_mm1.parallel.groups import build_process_groups, initialize_process_group
from megatron_mm1.training.build import build_module, unwrap

BATCH_SIZES = (1, 8, 32)
PIECES = 8000
WORDS = (8, 40)
"""Of a prompt: drawn between these."""
IMAGE_SIDE = 160
"""Of the PNG files, px."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time batched generation against transformers' generate.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="pairs timed per batch size (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="per prompt (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of both (%(default)s)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.new_tokens < 1:
        parser.error("--rounds and --new-tokens must be at least 1")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, words = made_tokenizer(folder)
        config = model_config(tokenizer)
        ours = Ours(config, tokenizer, args.new_tokens)
        export(config, ours.model, ours.groups, folder / "exported")
        theirs = Theirs(folder / "exported", args.new_tokens)
        batches = [Batch.of(size, words, seed=size) for size in BATCH_SIZES]
        pairs = [take_turns(ours, theirs, batch, args.rounds) for batch in batches]
    return judge(config, ours, batches, pairs, args)


@dataclass(frozen=True)
class Batch:
    """Prompts: an image and the text behind it."""

    texts: list[str]
    images: list[bytes]

    @staticmethod
    def of(size: int, words: Sequence[str], *, seed: int) -> "Batch":
        random = np.random.default_rng(seed)
        texts = [" ".join(random.choice(words, size=random.integers(*WORDS, endpoint=True))) for _ in range(size)]
        return Batch(texts, [picture(random) for _ in range(size)])


def picture(random: np.random.Generator) -> bytes:
    content = io.BytesIO()
    pixels = random.integers(0, 256, (IMAGE_SIDE // 8, IMAGE_SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    PIL.Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def made_tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """A SentencePiece model of made-up words, and the words."""
    random = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(random.choice(letters, size=random.integers(2, 9))) for _ in range(5000)]
    lines = [" ".join(random.choice(words, size=20)) for _ in range(1500)]
    train_tokenizer(lines, folder / "tokenizer.model", vocab_size=PIECES)
    return open_tokenizer(str(folder / "tokenizer.model")), words


def model_config(tokenizer: Tokenizer) -> MM1Config:
    """25 million parameters of decoder behind a small tower: large enough that products are most of a step."""
    return MM1Config(
        name="benchmark",
        model=ModelConfig(
            vision=VisionConfig(
                image_size=96, patch_size=12, num_layers=4, hidden_size=192, ffn_hidden_size=768, num_attention_heads=6
            ),
            connector=ConnectorConfig(connector="average_pool", tokens_per_image=16),
            decoder=DecoderConfig(
                num_layers=8,
                hidden_size=512,
                ffn_hidden_size=1408,
                num_attention_heads=8,
                vocab_size=tokenizer.vocab_size,
                init_method_std=0.06,  # a model whose weights are smaller repeats one token
            ),
        ),
        data=DataConfig(tokenizer=str(tokenizer.path), seq_length=512),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32", layer_backend="local"),
    )


class Ours:
    """The engine, made anew for every call: it knows no image."""

    def __init__(self, config: MM1Config, tokenizer: Tokenizer, new_tokens: int) -> None:
        initialize_process_group(timeout_minutes=5)
        self.groups = build_process_groups(config.parallel, seed=config.training.seed)
        self.config, self.tokenizer, self.new_tokens = config, tokenizer, new_tokens
        self.model = build_module(config, backend="local", pg_collection=self.groups)

    def __call__(self, batch: Batch) -> list[list[int]]:
        engine = Engine(self.config, self.model, self.tokenizer, pg_collection=self.groups)
        requests = [
            GenerationRequest(prompt=(Image(image), Text(text)), max_new_tokens=self.new_tokens)
            for text, image in zip(batch.texts, batch.images, strict=True)
        ]
        return [list(answer.token_ids) for answer in engine.generate(requests) if isinstance(answer, Generation)]


class Theirs:
    """transformers' processor and generate."""

    def __init__(self, folder: Path, new_tokens: int) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        self.new_tokens = new_tokens

    def __call__(self, batch: Batch) -> list[list[int]]:
        images = [[PIL.Image.open(io.BytesIO(image))] for image in batch.images]
        inputs = self.processor(text=[f"<image>{text}" for text in batch.texts], images=images)
        with torch.inference_mode():
            sequences = self.model.generate(**inputs, max_new_tokens=self.new_tokens, use_cache=True)
        end = self.model.generation_config.eos_token_id
        rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


def export(config: MM1Config, model: torch.nn.Module, groups, folder: Path) -> None:
    """The model as a folder for transformers."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = unwrap(model).sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": True})
    apply_factories(sharded)
    state: dict[str, torch.Tensor] = {}
    for shard in nested_values(sharded):
        if isinstance(shard, ShardedTensor):
            whole = state.setdefault(shard.key, torch.empty(shard.global_shape, dtype=shard.dtype))
            whole[shard.global_slice()] = shard.data.detach()
    their_config, plan, files = export_transformers(config, StateDict(state))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(their_config))
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    tensors = {name: tensor.contiguous() for name, tensor in collect(plan).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def take_turns(ours: Ours, theirs: Theirs, batch: Batch, rounds: int) -> list[tuple[float, float]]:
    """(our seconds, theirs) of each round, after one of each that is not counted; both give the same tokens."""
    expected, found = theirs(batch), ours(batch)
    if found != expected:
        raise ValueError(f"batch of {len(batch.texts)}: the two models give different tokens: {found} and {expected}")
    pairs = []
    for number in range(rounds):
        seconds = {}
        calls = [("ours", lambda: ours(batch)), ("theirs", lambda: theirs(batch))]
        for side, call in calls if number % 2 == 0 else reversed(calls):
            started = time.perf_counter()
            call()
            seconds[side] = time.perf_counter() - started
        pairs.append((seconds["ours"], seconds["theirs"]))
    return pairs


def judge(
    config: MM1Config,
    ours: Ours,
    batches: Sequence[Batch],
    pairs: Sequence[list[tuple[float, float]]],
    args: argparse.Namespace,
) -> int:
    """Print what was run and what came out; the exit code."""
    decoder, vision = config.model.decoder, config.model.vision
    each = config.model.connector.tokens_per_image
    settings: dict[str, object] = {
        "decoder": f"{decoder.num_layers} x {decoder.hidden_size}, {decoder.num_attention_heads} heads, feed-forward "
        f"{decoder.ffn_hidden_size}, vocabulary {decoder.vocab_size}; float32",
        "tower": f"{vision.num_layers} x {vision.hidden_size}, {vision.image_size} px; {each} positions per image",
        "parameters": f"{sum(parameter.numel() for parameter in ours.model.parameters()):,}",
        "new tokens": f"{args.new_tokens} per prompt at most",
        "threads": torch.get_num_threads(),
        "load average": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} logical processors",
        **{package: version(package) for package in ("transformers", "megatron-core")},
    }
    goals = []
    for batch, times in zip(batches, pairs, strict=True):
        size = len(batch.texts)
        lengths = [1 + each + len(ours.tokenizer.encode(text)) for text in batch.texts]
        own, other = (statistics.median(side) for side in zip(*times, strict=True))
        ratios = sorted(theirs / mine for mine, theirs in times)
        settings[f"batch of {size}"] = (
            f"prompts of {min(lengths)} to {max(lengths)} positions; ours {own:.2f} s, theirs {other:.2f} s (medians); "
            f"ratios {' '.join(f'{ratio:.2f}' for ratio in ratios)}"
        )
        goals.append(Goal(f"speed_batch_{size}", statistics.median(ratios), "x_transformers", ">", 1.0))
    return report(settings, goals)


if __name__ == "__main__":
    sys.exit(main())
