"""Batches per second from shards of images and captions: ours, a plain WebDataset pipeline, and megatron-energon.

All read the same tar files of 640 x 480 JPEGs, decode, resize to 378 x 378 (bicubic), normalise and pack sequences of
4096 positions with at most 16 images of 144, and may use the same cores, each in a process of its own. The peers are
set up as their users set them up, with Pillow and torchvision, at the best of several numbers of workers and of batches
ahead. Ours reads the shards as `mm1 data prepare` wrote them: it decodes the same JPEGs, but texts were tokenized in
advance; the share of the peers' time that tokenizing takes is printed. A token is a position that is not padding.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from goals import Goal

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mm1.config import MM1Config

CORPUS = Path(".cache/demo-corpus")
PEERS = ("webdataset", "energon")
GOALS = {"webdataset": 1.5, "energon": 1.2}
SHARDS, SAMPLES = 4, 1536
WARM_UP, TRIAL, RUN = 3.0, 4.0, 8.0
"""Seconds before the clock starts, and of a measurement."""


@dataclass(frozen=True)
class Setting:
    """How a loader is run.

    Attributes:
        num_workers: processes; 0: in the consumer's own.
        prefetch: batches that each is ahead, where the loader lets one choose.
    """

    num_workers: int
    prefetch: int = 2


TRIALS = (Setting(0), Setting(1), Setting(2), Setting(2, prefetch=4), Setting(2, prefetch=8))


@dataclass(frozen=True)
class Inputs:
    """What is loaded: the shards, the same as prepared for training, and the tokenizer of both."""

    shards: Path
    prepared: Path
    tokenizer: Path

    @classmethod
    def make(cls, folder: Path, *, samples: int = SAMPLES) -> "Inputs":
        """Write shards, energon's metadata and the prepared data set into `folder`."""
        from data_peers.shards import write_shards

        from megatron_mm1.data.prepare import prepare_in_parallel
        from megatron_mm1.data.prepare_processes import Recipe

        inputs = cls(folder / "shards", folder / "prepared", (CORPUS / "tokenizer.model").absolute())
        write_shards(inputs.shards, CORPUS, samples=samples, shards=SHARDS)
        recipe = Recipe(reader="webdataset", input=inputs.shards, tokenizer=inputs.tokenizer)
        prepare_in_parallel(recipe, output=inputs.prepared, workers=1)
        return inputs


def config_of(inputs: Inputs, setting: Setting) -> "MM1Config":
    """A run of MM1's sequences over the prepared data set."""
    from megatron_mm1.config.loading import load_config
    from megatron_mm1.config.schema import SourceConfig

    config = load_config(["--preset", "mm1-3b"])
    source = SourceConfig(name="captions", path=str(inputs.prepared), weight=1.0)
    data = replace(
        config.data, tokenizer=str(inputs.tokenizer), sources=(source,), validation=(), num_workers=setting.num_workers
    )
    return replace(config, data=data, training=replace(config.training, micro_batch_size=1))


def ours(config: "MM1Config") -> "Iterator[Tensor]":
    """Segment ids of our loader's batches, their pixels normalised as the trainer does it."""
    import torch

    from megatron_mm1.data.loader import train_batches
    from megatron_mm1.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(config.data.tokenizer)
    for batch in train_batches(config, tokenizer=tokenizer, dp_rank=0, dp_size=1):
        yield batch.to(torch.device("cpu")).segment_ids


def peer(name: str, inputs: Inputs, setting: Setting) -> "Iterator[Tensor]":
    """Segment ids of a peer's batches."""
    from data_peers import energon, plain_webdataset

    from megatron_mm1.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(inputs.tokenizer)
    ids = {id_of: getattr(tokenizer, id_of) for id_of in ("bos_id", "image_id", "pad_id")}
    batches = {"webdataset": plain_webdataset.batches, "energon": energon.batches}[name]
    loader = batches(inputs.shards, tokens=ids | {"model": str(inputs.tokenizer)}, **vars(setting))
    return (batch.segment_ids for batch in loader)


def rate(batches: "Iterable[Tensor]", *, warm_up: float, seconds: float) -> float:
    """Positions per second that are not padding, from the first batch after the warm-up on."""
    clock = time.perf_counter
    iterator = iter(batches)
    next(iterator)
    start = begun = clock()
    warm, tokens = False, 0
    for segment_ids in iterator:
        now = clock()
        if warm:
            tokens += int((segment_ids > 0).sum())
            if now - start >= seconds:
                return tokens / (now - start)
        elif now - begun >= warm_up:
            warm, start = True, now
    raise ValueError("the batches ended before the measurement")


def run_side(side: str, inputs: Inputs, setting: Setting, *, seconds: float) -> float:
    """Tokens per second of one side, in a process of its own with one thread to each worker.

    Raises:
        RuntimeError: it failed, with the end of what it wrote.
    """
    paths = [str(path) for path in (inputs.shards, inputs.prepared, inputs.tokenizer)]
    order = {"side": side, "inputs": paths, "setting": vars(setting), "seconds": seconds}
    environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "DALI_NUM_THREADS")}
    command = [sys.executable, str(Path(__file__).absolute()), json.dumps(order)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        raise RuntimeError(f"{side} with {setting}: {process.stderr.strip()[-2000:]}")
    return float(process.stdout.splitlines()[-1])


def side_main(order: dict[str, Any]) -> None:
    """In the process of one side: print its tokens per second."""
    import torch

    torch.set_num_threads(1)
    inputs, setting = Inputs(*map(Path, order["inputs"])), Setting(**order["setting"])
    side = order["side"]
    batches = ours(config_of(inputs, setting)) if side == "ours" else peer(side, inputs, setting)
    print(rate(batches, warm_up=WARM_UP, seconds=order["seconds"]), flush=True)
    os._exit(0)  # workers that wait to hand over a batch are not waited for


def best_setting(side: str, inputs: Inputs) -> Setting:
    """The fastest of `TRIALS`, each run once."""
    rates = {setting: run_side(side, inputs, setting, seconds=TRIAL) for setting in TRIALS}
    for setting, tokens in rates.items():
        print(f"trial of {side}, {setting}: {tokens:,.0f} tokens/s", flush=True)
    return max(rates, key=rates.__getitem__)


def tokenizing_seconds(inputs: Inputs) -> float:
    """Of a caption, one after another as the peers do it."""
    from data_peers.packed import text_ids
    from data_peers.shards import captions

    texts, model = captions(CORPUS)[:20_000], str(inputs.tokenizer)
    text_ids(texts[0], model=model)
    start = time.perf_counter()
    for text in texts:
        text_ids(text, model=model)
    return (time.perf_counter() - start) / len(texts)


def measure(arguments: Namespace) -> tuple[dict[str, Any], list[Goal]]:
    """Settings and goals; `arguments` has repeats."""
    with TemporaryDirectory(dir=CORPUS.parent) as folder:
        inputs = Inputs.make(Path(folder))
        reasons: dict[str, str] = {}
        settings = {"ours": Setting(os.cpu_count() or 1)}
        for side in PEERS:
            try:
                if side == "energon":
                    _add_energon_metadata(inputs)
                settings[side] = best_setting(side, inputs)
            except (RuntimeError, ImportError, subprocess.CalledProcessError) as error:
                reasons[side] = str(error)
        measured: dict[str, list[float]] = {side: [] for side in settings}
        for _ in range(arguments.repeats):
            for side, setting in settings.items():
                measured[side].append(run_side(side, inputs, setting, seconds=RUN))
        rates = {side: median(values) for side, values in measured.items()}
        caption = tokenizing_seconds(inputs)
        positions = _positions_per_caption(inputs)
    for side, tokens in rates.items():
        print(f"{side}, {settings[side]}: {tokens:,.0f} tokens/s of {[round(each) for each in measured[side]]}")
        if side in PEERS:
            cores = max(settings[side].num_workers, 1)
            share = caption * tokens / positions / cores
            print(f"tokenizing takes {caption * 1e6:.0f} us a caption, {share:.2%} of the time of {side}'s workers")
    return _report(settings, reasons), goals_of(rates)


def goals_of(rates: dict[str, float]) -> list[Goal]:
    """How many times as fast ours is as each peer; not a number for one that did not run."""
    missing = float("nan")
    return [
        Goal(f"vs_{side}", rates["ours"] / rates.get(side, missing), "times", ">", bound)
        for side, bound in GOALS.items()
    ]


def _add_energon_metadata(inputs: Inputs) -> None:
    from data_peers.energon import add_metadata

    add_metadata(inputs.shards)


def _positions_per_caption(inputs: Inputs) -> float:
    """Positions of an image with its caption, on average, from the prepared data set."""
    from megatron_mm1.data.source import IndexedSource

    counts = IndexedSource(inputs.prepared, tokenizer_fingerprint=None).manifest.counts
    return counts["tokens"] / counts["documents"] + 143


def _report(settings: dict[str, Setting], reasons: dict[str, str]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("webdataset", "megatron-energon", "pillow")}
    failed = {f"{side} did not run": reason for side, reason in reasons.items()}
    return {"samples": f"{SAMPLES} in {SHARDS} shards", "settings": settings, "versions": versions, **failed}


if __name__ == "__main__":
    side_main(json.loads(sys.argv[1]))
