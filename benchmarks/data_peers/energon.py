"""megatron-energon with its own packing: images are decoded after the sequences' samples have been selected."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.energon import (
    CaptioningSample,
    Sample,
    TaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.edataclass import edataclass

from data_peers.packed import Example, PackedSequence, greedy, pack, pixels, text_ids

SHUFFLE = 200
PACKING_BUFFER = 128
"""Samples among which each sequence's are selected."""


def add_metadata(shards: Path) -> None:
    """`energon prepare`: an index of the shards and what their samples are."""
    command = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()", "prepare", "--no-progress"]
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--num-workers", "2", "--force-overwrite"]
    kind = ["--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}']
    subprocess.run([*command, *options, *kind, str(shards)], check=True, stdout=subprocess.DEVNULL)


@edataclass
class Encoded(Sample):
    """An example whose image is still encoded, until it has been selected."""

    example: Example


@edataclass
class Packed(Sample):
    """A finished sequence."""

    sequence: PackedSequence


class Encoder(TaskEncoder):
    """As megatron-energon's documentation has it for packing with images."""

    decoder = None

    def __init__(self, tokens: Mapping[str, Any]) -> None:
        super().__init__()
        self._model = tokens["model"]
        self._ids = {name: tokens[name] for name in ("bos_id", "image_id", "pad_id")}

    @stateless
    def preencode_sample(self, sample: CaptioningSample) -> Encoded:
        caption = sample.caption.decode() if isinstance(sample.caption, bytes) else sample.caption
        return Encoded.derive_from(sample, example=Example(text_ids(caption, model=self._model), sample.image))

    @stateless
    def postencode_sample(self, sample: Encoded) -> Encoded:
        return Encoded.derive_from(sample, example=Example(sample.example.ids, pixels(sample.example.image)))

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        remaining, sequences = iter(samples), []
        for chosen in greedy(sample.example for sample in samples):
            sequences.append([next(remaining) for _ in chosen])
        return sequences

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Packed:
        return Packed.derive_from(samples[0], sequence=pack([sample.example for sample in samples], **self._ids))


def batches(shards: Path, *, tokens: Mapping[str, Any], num_workers: int, prefetch: int) -> Iterable[PackedSequence]:
    """As of plain_webdataset; the shards have metadata."""
    workers = WorkerConfig(rank=0, world_size=1, num_workers=num_workers)
    dataset = get_train_dataset(
        shards,
        worker_config=workers,
        batch_size=None,
        packing_buffer_size=PACKING_BUFFER,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=100,
        task_encoder=Encoder(tokens),
    )
    return (packed.sequence for packed in get_loader(dataset, prefetch_factor=prefetch))
