"""A corpus that any machine can read: its images are GIFs, which Pillow decodes, so that it needs no DALI."""

import dataclasses
from pathlib import Path

import numpy as np

from megatron_mm1.config import MM1Config
from megatron_mm1.config.presets import preset
from megatron_mm1.config.schema import ParallelConfig, SourceConfig
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.records import Document, Image, Text
from tests.corpora import encoded, sentence, small_tokenizer


def training_config(name: str, folder: Path, *, precision: str = "bf16") -> MM1Config:
    """A preset (mm1-tiny, mm1-tiny-moe) in one process over captions in `folder`, which are made first."""
    if not (folder / "train").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = small_tokenizer(folder)
        for split, count, seed in (("train", 64, 1), ("validation", 24, 2)):
            prepare(_captions(count, seed=seed), tokenizer=tokenizer, output=folder / split)
    config = preset(name)

    def source(split: str) -> tuple[SourceConfig, ...]:
        return (SourceConfig(name="captions", path=str(folder / split)),)

    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        data=dataclasses.replace(
            config.data,
            tokenizer=str(folder / "tokenizer.model"),
            sources=source("train"),
            validation=source("validation"),
            seq_length=128,  # a bf16 step of 256 positions takes a CPU seconds
        ),
        optimizer=dataclasses.replace(config.optimizer, lr=1e-3, lr_warmup_iters=2, lr_decay_iters=100),
        training=dataclasses.replace(
            config.training,
            micro_batch_size=1,
            global_batch_size=2,
            train_iters=5,
            eval_interval=0,
            precision=precision,
        ),
        logging=dataclasses.replace(config.logging, log_interval=1, tensorboard=False, progress_bar=False),
        run_dir=str(folder / "run"),
    )


def _captions(count: int, *, seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document((Image(encoded("GIF", seed=seed * 1000 + n)), Text(sentence(rng, rng.integers(1, 9)))), f"caption {n}")
        for n in range(count)
    ]
