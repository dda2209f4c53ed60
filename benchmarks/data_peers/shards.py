"""Shards of JPEG files with captions, made from real pictures and texts; the same for the same seed."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import webdataset

SIZE = (640, 480)
"""Width and height, px."""
QUALITY = 90
_SMALLEST = 128


def write_shards(folder: Path, corpus: Path, *, samples: int, shards: int, seed: int = 0) -> int:
    """Write `shards` tar files of `samples` in all, each a .jpg and a .txt; returns the bytes of the tar files.

    Args:
        corpus: the demo corpus, with its raw files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pictures, texts = list(_pictures(corpus / "raw" / "interleaved" / "train")), captions(corpus)
    written = 0
    for shard, numbers in enumerate(np.array_split(np.arange(samples), shards)):
        file = folder / f"{shard:05d}.tar"
        with webdataset.TarWriter(str(file)) as tar:
            for number in numbers.tolist():
                picture, caption = pictures[rng.integers(len(pictures))], texts[rng.integers(len(texts))]
                tar.write({"__key__": f"{number:08d}", "jpg": jpeg(picture, rng), "txt": caption})
        written += file.stat().st_size
    return written


def jpeg(picture: PIL.Image.Image, rng: np.random.Generator) -> bytes:
    """A random crop, at half the picture at least, as a JPEG file of `SIZE`."""
    width, height = (round(side * rng.uniform(0.5, 1)) for side in picture.size)
    left, top = (rng.integers(whole - part + 1) for whole, part in zip(picture.size, (width, height), strict=True))
    cropped = picture.resize(SIZE, PIL.Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    content = io.BytesIO()
    cropped.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _pictures(folder: Path) -> Iterator[PIL.Image.Image]:
    """Pictures of the manual, without its icons."""
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in (".png", ".jpg", ".jpeg"):
            with PIL.Image.open(file) as picture:
                if min(picture.size) >= _SMALLEST:
                    yield picture.convert("RGB")


def captions(corpus: Path) -> list[str]:
    """Those texts that are as short as captions are."""
    return [text for text in text_lines(corpus) if len(text) < 400]


def text_lines(corpus: Path) -> list[str]:
    """The texts of the demo corpus: glosses of WordNet."""
    texts = []
    for file in sorted((corpus / "raw" / "text" / "train").iterdir()):
        with file.open(encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] if file.suffix == ".jsonl" else line.strip() for line in lines]
    return [text for text in texts if text]
