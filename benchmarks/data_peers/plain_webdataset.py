"""A WebDataset pipeline in torch's DataLoader, as training scripts have it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch.utils.data import DataLoader

from data_peers.packed import Example, PackedSequence, greedy, pack, pixels, text_ids

SHUFFLE = 200
"""Samples in the shuffle buffer."""


def batches(shards: Path, *, tokens: Mapping[str, Any], num_workers: int, prefetch: int) -> Iterable[PackedSequence]:
    """Packed sequences without end.

    Args:
        tokens: SentencePiece `model` and the ids `bos_id`, `image_id` and `pad_id`.
        prefetch: sequences that each worker is ahead.
    """
    ids = {name: tokens[name] for name in ("bos_id", "image_id", "pad_id")}

    def example(sample: Mapping[str, Any]) -> Example:
        return Example(text_ids(sample["txt"].decode(), model=tokens["model"]), pixels(sample["jpg"]))

    def packed(examples: Iterable[Example]) -> Iterator[PackedSequence]:
        for chosen in greedy(examples):
            yield pack(chosen, **ids)

    dataset = webdataset.DataPipeline(
        webdataset.ResampledShards([str(file) for file in sorted(shards.glob("*.tar"))]),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(SHUFFLE),
        webdataset.map(example),
        packed,
    )
    ahead = {"prefetch_factor": prefetch, "worker_init_fn": _one_thread} if num_workers else {}
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, **ahead)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
