"""Finished work, kept so that an interrupted evaluation goes on where it was."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from megatron_mm1.evaluation.fewshot import Request
from megatron_mm1.evaluation.task import Outcome, Refusal
from megatron_mm1.evaluation.template import Stopping
from megatron_mm1.inference.requests import Score

Outcomes = tuple[Outcome | Refusal, ...]
"""Of the requests of a chunk, in order."""


def digest_of_chunk(requests: Sequence[Request], stopping: Stopping, *, high_resolution: int | None = None) -> str:
    """Names what is asked: texts, places and sizes of images, and where answers end.

    A chunk is the unit because answers depend, in their last digits, on what they are computed together with.
    """
    return xxhash.xxh3_128_hexdigest(repr((tuple(requests), stopping, high_resolution)).encode())


class Journal:
    """The outcomes of one model, on disk; each writer has its own file, and all are read.

    Args:
        folder: of the files.
        model: names what answered, its layout included; outcomes of others in the same folder are not seen.
    """

    def __init__(self, folder: Path, *, model: str) -> None:
        self._folder, self._model = folder, model

    def read(self) -> dict[str, Outcomes]:
        """Outcomes by the digest of their chunk. A line that was being written when its process died is left out."""
        known: dict[str, Outcomes] = {}
        for file in sorted(self._folder.glob(f"{self._model}-*.jsonl")):
            for line in file.read_bytes().splitlines():
                if (entry := _parsed(line)) is not None:
                    known[entry["chunk"]] = tuple(_outcome(one) for one in entry["outcomes"])
        return known

    def add(self, digest: str, outcomes: Iterable[Outcome | Refusal], *, writer: int) -> None:
        """Note a finished chunk."""
        line = json.dumps({"chunk": digest, "outcomes": [_plain(one) for one in outcomes]}) + "\n"
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{self._model}-{writer}.jsonl").open("a+b") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")
            file.write(line.encode())


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _plain(one: Outcome | Refusal) -> dict[str, Any]:
    if isinstance(one, Refusal):
        return asdict(one)
    return {**asdict(one), "scores": [score.token_log_likelihoods for score in one.scores]}


def _outcome(fields: Mapping[str, Any]) -> Outcome | Refusal:
    if "message" in fields:
        return Refusal(**fields)
    return Outcome(**{**fields, "scores": tuple(Score(tuple(values)) for values in fields["scores"])})
