"""`mm1 data prepare`: text tokenized per core, and image shards taken over compared with `cp`.

Text is that of the demo corpus, repeated in another order to 24 MB of JSON lines, prepared by this process alone, from
the first byte read to the finished folder. Shards are tar files of 640 x 480 JPEGs with captions, prepared with
`--image-check header` by one process; `cp` copies the same files. Both read files that were read before, and both end
when what they wrote is on the disk (fsync).
"""

import json
import os
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from data_peers.shards import text_lines, write_shards
from goals import Goal

from megatron_mm1.data.prepare import prepare
from megatron_mm1.data.preparing import Checks
from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.tokenizer import open_tokenizer

CORPUS = Path(".cache/demo-corpus")
TEXT_SIZE = 24_000_000
"""Bytes of UTF-8 text."""
SAMPLES, SHARDS = 8000, 4


def write_text(file: Path, corpus: Path, *, size: int) -> int:
    """JSON lines of documents of some 2,000 characters each, `size` bytes of text at least; returns how many bytes."""
    lines, rng, written = text_lines(corpus), np.random.default_rng(0), 0
    with file.open("w", encoding="utf-8") as opened:
        while written < size:
            text = "\n".join(lines[number] for number in rng.integers(len(lines), size=25))
            opened.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def prepare_alone(reader: str, source: Path, output: Path, **checks: Any) -> None:
    """In this process, into a folder that is removed first."""
    shutil.rmtree(output, ignore_errors=True)
    opened = open_reader(reader, source, {})
    tokenizer = open_tokenizer(CORPUS / "tokenizer.model")
    prepare(opened, tokenizer=tokenizer, output=output, checks=Checks(filters=opened.filters, **checks))


def copy(source: Path, output: Path) -> None:
    """`cp` of every file of a folder, to the disk."""
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(["cp", "-r", str(source), str(output)], check=True)
    for file in output.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seconds_of(work: Callable[[], None]) -> float:
    """Of one run, begun with nothing left to be written of what came before."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(arguments: Namespace) -> tuple[dict[str, Any], list[Goal]]:
    """Settings and goals; `arguments` has repeats."""
    with TemporaryDirectory(dir=CORPUS.parent) as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        text_size = write_text(text, CORPUS, size=TEXT_SIZE)
        shards_size = write_shards(folder / "shards", CORPUS, samples=SAMPLES, shards=SHARDS)
        works = {
            "text": lambda: prepare_alone("text", text, folder / "text"),
            "shards": lambda: prepare_alone("webdataset", folder / "shards", folder / "prepared", image_check="header"),
            "cp": lambda: copy(folder / "shards", folder / "copied"),
        }
        for work in works.values():  # once before: every run finds its input and its code in memory
            work()
        measured: dict[str, list[float]] = {of: [] for of in works}
        for _ in range(arguments.repeats):
            for of, work in works.items():
                measured[of].append(seconds_of(work))
    seconds = {of: median(values) for of, values in measured.items()}
    sizes = {"text": text_size, "shards": shards_size, "cp": shards_size}
    for of, each in seconds.items():
        print(f"{of}: {sizes[of] / 1e6:.1f} MB in {each:.2f} s of {[round(value, 2) for value in measured[of]]}")
    goals = [
        Goal("text_prepared", text_size / seconds["text"] / 1e6, "MB/s", ">", 5.0),
        Goal("copy_ratio", seconds["cp"] / seconds["shards"], "times", ">", 0.3),
    ]
    return {"text": f"{text_size / 1e6:.1f} MB", "shards": f"{shards_size / 1e6:.1f} MB"}, goals
