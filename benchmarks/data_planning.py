"""Planning and packing: how full sequences are, how fast they are planned, and whether memory grows with the corpus.

Lengths are drawn as web corpora have them, as functions of the document's number: a corpus of any size costs no memory.
Sequences are MM1's: 4096 positions, 16 images of 144. `max fill` of a sequence is the larger of its share of filled
positions and its share of the 16 images; caption sequences are full of images at about 70 % of the positions.
"""

import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from goals import Goal

from megatron_mm1.data.arrays import ranges
from megatron_mm1.data.order import KeyedPermutation
from megatron_mm1.data.pools import PackedStream, PackingLimits, Share

LIMITS = PackingLimits(seq_length=4096, max_images=16, tokens_per_image=144, lookahead=64)
TABLE = 1 << 16
"""Documents after which lengths repeat, in another order."""


class Corpus:
    """Documents whose lengths are drawn from a table.

    Args:
        draw: [TABLE] random numbers -> stored tokens and images of as many documents.
    """

    def __init__(
        self, name: str, size: int, draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.name = self.fingerprint = name
        self._size = size
        tokens, images = draw(np.random.default_rng(0))
        self._images = images.astype(np.int64)
        self._tokens = np.maximum(tokens.astype(np.int64), 2) + 2 * self._images
        self._bounds = np.concatenate([[0], np.cumsum(self._images)])
        owner = np.repeat(np.arange(TABLE), self._images)
        self._positions = (np.arange(len(owner)) - self._bounds[owner]) * (self._tokens // np.maximum(self._images, 1))[
            owner
        ]
        self._row = KeyedPermutation(name, TABLE)

    def __len__(self) -> int:
        return self._size

    def num_tokens(self, documents: np.ndarray) -> np.ndarray:
        return self._tokens[self._row(documents % TABLE)]

    def num_images(self, documents: np.ndarray) -> np.ndarray:
        return self._images[self._row(documents % TABLE)]

    def images_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self._row(documents % TABLE)
        places = ranges(self._bounds[rows], self._bounds[rows + 1])
        return self._positions[places], np.zeros((len(places), 2), np.int64)


def captions(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Alt texts: a median of 14 tokens."""
    return np.minimum(rng.lognormal(2.6, 0.7, TABLE), 128) + 2, np.ones(TABLE)


def interleaved(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Web pages: a median of 540 tokens, 1 to 30 images, 4 on average."""
    return np.minimum(rng.lognormal(6.3, 0.9, TABLE), 60_000), np.minimum(rng.geometric(0.25, TABLE), 30)


def text(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Web text: a median of 490 tokens, a mean of 900."""
    return np.minimum(rng.lognormal(6.2, 1.1, TABLE), 200_000), np.zeros(TABLE)


KINDS = (captions, interleaved, text)


def fills(stream: PackedStream, count: int) -> tuple[float, float]:
    """Mean share of filled positions, and of the larger of that and the share of the images, over `count` sequences."""
    tokens, most = [], []
    for index in range(count):
        images = stream.num_images(index)
        stored = sum(piece.stop - piece.start for piece in stream.sequence(index))
        tokens.append((stored + images * (LIMITS.tokens_per_image - 1)) / LIMITS.seq_length)
        most.append(max(tokens[-1], images / LIMITS.max_images))
    return float(np.mean(tokens)), float(np.mean(most))


def peak_memory(corpus: Corpus) -> int:
    """Bytes at most while one is planned."""
    tracemalloc.start()
    PackedStream([Share(0, corpus.name, corpus)], limits=LIMITS, key="0").sequence(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure(arguments: Namespace) -> tuple[dict[str, Any], list[Goal]]:
    """Settings and goals; `arguments` has documents (of each source) and repeats."""
    size = arguments.documents
    corpora = [Corpus(kind.__name__, size, kind) for kind in KINDS]
    goals = []
    for number, corpus in enumerate(corpora):
        seconds = []
        stream = PackedStream([Share(number, corpus.name, corpus)], limits=LIMITS, key="warm-up")
        for turn in range(arguments.repeats):
            start = time.perf_counter()
            stream = PackedStream([Share(number, corpus.name, corpus)], limits=LIMITS, key=str(turn))
            seconds.append(time.perf_counter() - start)
        filled, most = fills(stream, 4000)
        goals.append(Goal(f"{corpus.name}_max_fill", most, "share", ">", 0.97))
        print(f"{corpus.name}: token fill {filled:.4f}")
        goals.append(Goal(f"{corpus.name}_planned", size / median(seconds) / 1e6, "M examples/s", ">", 1.0))
    shares = [Share(number, corpus.name, corpus) for number, corpus in enumerate(corpora)]
    filled, most = fills(PackedStream(shares, limits=LIMITS, key="0"), 4000)
    goals.append(Goal("mixed_max_fill", most, "share", ">", 0.985))
    print(f"mixed: token fill {filled:.4f}")
    small, large = (peak_memory(Corpus("interleaved", times * size, interleaved)) for times in (1, 8))
    goals.append(Goal("memory_of_8_times_the_corpus", large / small, "times", "<", 1.1))
    return {"documents of each source": f"{size:,}", "repeats": arguments.repeats, "limits": LIMITS}, goals
