"""The search: the evaluation set in memory as an index, training data streamed past it by several processes."""

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_mm1.data.overlap.data_sets import DataSet, Sample
from megatron_mm1.data.overlap.fingerprints import image_hash, perceptual_hash, run_hashes, text_hash, words_of
from megatron_mm1.data.overlap.index import NearPostings, Postings
from megatron_mm1.data.processes import end_with_parent
from megatron_mm1.errors import UserError

LISTED = 100
"""Hits that are listed for each evaluation document and kind; all are counted."""


class Kind(StrEnum):
    """How two documents overlap."""

    IMAGE = "image bytes"
    SIMILAR_IMAGE = "similar image"
    TEXT = "whole text"
    TEXT_RUN = "run of words"


@dataclass(frozen=True)
class Settings:
    """What counts as overlap.

    Attributes:
        hamming: bits of 64 in which the perceptual hashes of similar images differ at most.
        text_words: length of a shared run of words; 0: whole texts only.
    """

    hamming: int = 4
    text_words: int = 8


@dataclass(frozen=True)
class Hit:
    """A training document (`a`) that shares something with an evaluation document (`b`).

    Attributes:
        distance: differing bits of the perceptual hashes; 0 for the other kinds.
    """

    b: str
    a: str
    kind: Kind
    distance: int = 0


@dataclass
class Counts:
    """What was read of a data set.

    Attributes:
        documents, images: compared.
        rejected: records that their reader cannot use.
        unhashed: images that were compared by their bytes alone: blank, damaged or too large.
    """

    documents: int = 0
    images: int = 0
    rejected: int = 0
    unhashed: int = 0

    def add(self, other: "Counts") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Overlap:
    """What was found.

    Attributes:
        a, b: what was read.
        a_documents: training documents with overlap, by kind.
        matches: [B] int64 by kind: with how many training documents each evaluation document overlaps.
        hits: the first `LISTED` for each evaluation document and kind, in the order of the training data.
    """

    a: Counts
    b: Counts
    a_documents: Counter[Kind]
    matches: dict[Kind, np.ndarray]
    hits: list[tuple[int, Hit]]


@dataclass(frozen=True)
class _Fingerprints:
    """[n] uint64 each."""

    images: np.ndarray
    similar: np.ndarray
    text: np.ndarray
    runs: np.ndarray


def _fingerprints(sample: Sample, settings: Settings) -> _Fingerprints:
    words = words_of(sample.text)
    similar = [perceptual_hash(data) for data in sample.images]
    return _Fingerprints(
        images=np.array([image_hash(data) for data in sample.images], np.uint64),
        similar=np.array([value for value in similar if value is not None], np.uint64),
        text=np.array([text_hash(words)] if words else [], np.uint64),
        runs=run_hashes(words, settings.text_words) if settings.text_words else np.zeros(0, np.uint64),
    )


class EvaluationIndex:
    """An evaluation set in memory."""

    def __init__(self, data_set: DataSet, settings: Settings) -> None:
        self._settings = settings
        self._keys: list[str] = []
        self._counts = Counts()
        prints = []
        for key, some in self._read(data_set, data_set.shards(), self._counts):
            self._keys.append(key)
            prints.append(some)
        self._images = Postings(some.images for some in prints)
        self._similar = NearPostings((some.similar for some in prints), distance=settings.hamming)
        self._texts = Postings(some.text for some in prints)
        self._runs = Postings(some.runs for some in prints)

    def search(self, data_set: DataSet, shards: Iterable[Any]) -> Overlap:
        """What of some shards of training data overlaps."""
        found = self.nothing()
        for key, prints in self._read(data_set, shards, found.a):
            for kind, documents, distances in self._matches(prints):
                found.a_documents[kind] += bool(len(documents))
                listed = found.matches[kind][documents] < LISTED
                found.matches[kind][documents] += 1
                for document, distance in zip(documents[listed].tolist(), distances[listed].tolist(), strict=True):
                    found.hits.append((document, Hit(self._keys[document], key, kind, distance)))
        return found

    def nothing(self) -> Overlap:
        matches = {kind: np.zeros(len(self._keys), np.int64) for kind in Kind}
        return Overlap(Counts(), self._counts, Counter(), matches, [])

    def _read(self, data_set: DataSet, shards: Iterable[Any], counts: Counts) -> Iterator[tuple[str, _Fingerprints]]:
        """Key and fingerprints of every document, counted in `counts`."""
        for shard in shards:
            for sample in data_set.read(shard):
                if sample is None:
                    counts.rejected += 1
                    continue
                prints = _fingerprints(sample, self._settings)
                unhashed = len(prints.images) - len(prints.similar)
                counts.add(Counts(documents=1, images=len(prints.images), unhashed=unhashed))
                yield sample.key, prints

    def _matches(self, prints: _Fingerprints) -> Iterator[tuple[Kind, np.ndarray, np.ndarray]]:
        """By kind: numbers of the evaluation documents with overlap, and their distances."""
        yield Kind.SIMILAR_IMAGE, *self._similar.documents(prints.similar)
        for kind, postings, hashes in (
            (Kind.IMAGE, self._images, prints.images),
            (Kind.TEXT, self._texts, prints.text),
            (Kind.TEXT_RUN, self._runs, prints.runs),
        ):
            documents = postings.documents(hashes)
            yield kind, documents, np.zeros_like(documents)


def find_overlap(a: DataSet, b: DataSet, *, settings: Settings, num_workers: int = 1) -> Overlap:
    """What of `b`, which is held in memory, is in `a`, which is streamed; `num_workers` does not change the result.

    Args:
        a: training data.
        b: the evaluation set.
        num_workers: processes.

    Raises:
        UserError: a process was killed.
    """
    index = EvaluationIndex(b, settings)
    total = index.nothing()
    shards = a.shards()
    if num_workers == 1:
        _add_up(total, (index.search(a, [shard]) for shard in tqdm(shards, unit="shard", disable=None)))
        return total
    # Not forked: object storage has threads in this process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (index, a)) as pool:
        try:
            parts = pool.map(_search_shard, shards)
            _add_up(total, tqdm(parts, total=len(shards), unit="shard", disable=None))
        except BrokenProcessPool:
            raise UserError(
                "a process of the search was killed: with too little memory, use a smaller --num-workers"
            ) from None
    return total


def _add_up(total: Overlap, parts: Iterable[Overlap]) -> None:
    for part in parts:
        total.a.add(part.a)
        total.a_documents.update(part.a_documents)
        listed = {kind: np.minimum(matches, LISTED) for kind, matches in total.matches.items()}
        for document, hit in part.hits:
            if listed[hit.kind][document] < LISTED:
                listed[hit.kind][document] += 1
                total.hits.append((document, hit))
        for kind, matches in part.matches.items():
            total.matches[kind] += matches


class _Worker:
    """What a process of the pool has: set once when it starts."""

    index: EvaluationIndex
    data_set: DataSet


def _start_worker(index: EvaluationIndex, data_set: DataSet) -> None:
    end_with_parent()
    _Worker.index, _Worker.data_set = index, data_set


def _search_shard(shard: Any) -> Overlap:
    return _Worker.index.search(_Worker.data_set, [shard])
