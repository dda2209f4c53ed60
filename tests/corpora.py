"""Small data sets made on the spot: coloured squares with their colour's name, and what training makes of them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from megatron_mm1.config import MM1Config
from megatron_mm1.config.schema import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.records import Document, Image, Text
from megatron_mm1.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

WORDS = [
    "red",
    "green",
    "blue",
    "yellow",
    "square",
    "circle",
    "of",
    "a",
    "the",
    "big",
    "small",
    "with",
    "and",
    "is",
    "in",
    "on",
]


def encoded(
    format: str = "PNG", *, size: tuple[int, int] = (20, 12), mode: str = "RGB", seed: int = 0, **options
) -> bytes:
    """A smooth random picture of (width, height) px, encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize(size, PIL.Image.Resampling.BICUBIC).convert(mode)
    content = io.BytesIO()
    picture.save(content, format, **options)
    return content.getvalue()


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def small_tokenizer(folder: Path) -> Tokenizer:
    rng = np.random.default_rng(0)
    train_tokenizer([sentence(rng, 12) for _ in range(200)], folder / "tokenizer.model", vocab_size=320)
    return open_tokenizer(folder / "tokenizer.model")


def caption_documents(count: int, *, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document((Image(encoded(seed=seed * 1000 + n)), Text(sentence(rng, rng.integers(1, 9)))), f"caption {n}")
        for n in range(count)
    ]


def page_documents(count: int, *, seed: int = 0) -> list[Document]:
    """Documents of up to four images and 200 words, longer than a sequence at times; some texts are not trained."""
    rng = np.random.default_rng(seed)
    documents = []
    for n in range(count):
        parts: list[Text | Image] = []
        for _ in range(rng.integers(1, 5)):
            parts.append(Text(sentence(rng, rng.integers(1, 50)), trained=bool(rng.integers(0, 4))))
            if rng.integers(0, 2):
                parts.append(Image(encoded(seed=int(rng.integers(0, 50)))))
        documents.append(Document(tuple(parts), f"page {n}"))
    return documents


def small_config(folder: Path, **data: object) -> MM1Config:
    """A run over two prepared sources in `folder` (made when first asked for)."""
    folder.mkdir(exist_ok=True)
    tokenizer = (
        small_tokenizer(folder)
        if not (folder / "tokenizer.model").exists()
        else open_tokenizer(folder / "tokenizer.model")
    )
    for name, documents in (("captions", caption_documents), ("pages", page_documents)):
        for split, seed in (("train", 1), ("validation", 2)):
            output = folder / name / split
            if not output.exists():
                prepare(documents(40 if split == "train" else 20, seed=seed), tokenizer=tokenizer, output=output)

    def sources(split: str) -> tuple[SourceConfig, ...]:
        shares = {"captions": 0.6, "pages": 0.4}
        return tuple(SourceConfig(name=name, path=str(folder / name / split), weight=shares[name]) for name in shares)

    return MM1Config(
        name="small",
        model=ModelConfig(
            decoder=DecoderConfig(
                num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, vocab_size=320
            ),
            vision=VisionConfig(image_size=16, patch_size=8),
            connector=ConnectorConfig(tokens_per_image=4),
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8, eval_iters=3),
        data=replace(
            DataConfig(
                tokenizer=str(folder / "tokenizer.model"),
                sources=sources("train"),
                validation=sources("validation"),
                seq_length=64,
                max_images_per_sequence=5,
                packing_lookahead=8,
                num_workers=0,
            ),
            **data,
        ),
    )


def write_jsonl(file: Path, rows: list[object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
