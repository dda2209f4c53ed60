"""Sources packed into sequences, pool by pool: reading any sequence costs the packing of one pool, whatever the corpus.

A pool is about 65,536 documents: 256 stretches of 256 neighbours, drawn from all over the source, then shuffled and
packed. Every epoch visits the pools, and the sequences of each, in another order. What a sequence holds stays the same:
so the number of sequences of each pool, which is all that is kept of every pool, is found once.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megatron_mm1.data.order import KeyedPermutation, permutation
from megatron_mm1.data.packing import cut_documents, pack_best_fit, split_documents
from megatron_mm1.errors import UserError

_STRETCH = 256
_POOL = 65_536
_REMEMBERED_POOLS = 4
_MOST_THREADS = 8


class Documents(Protocol):
    """What packing needs to know of a prepared source (`IndexedSource`)."""

    fingerprint: str

    def __len__(self) -> int: ...

    def num_tokens(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64 stored tokens of documents: each image is one."""

    def num_images(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64."""

    def images_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [I] among their document's stored tokens and sizes [I, 2] (height, width) of all their images."""

    def trained(self, documents: np.ndarray) -> list[np.ndarray]:
        """[tokens] bool for each document: which of its stored tokens are targets of the loss."""


class ImageCosts(Protocol):
    """What images take of a sequence (`ImageTokens.costs`)."""

    def __call__(self, sizes: np.ndarray, num_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths [I, 2] of all images of some documents, and how many each document has [D] ->
        how many images the tower encodes for each, [I] int64, and the positions it takes, [I] int64.
        """
        ...


@dataclass(frozen=True)
class PackingLimits:
    """What a sequence holds (names as in DataConfig).

    Attributes:
        image_costs: None where each image is one and takes `tokens_per_image` positions.
        long_documents: see `DataConfig`.
        packed: put documents together; else each of their pieces is a sequence.
    """

    seq_length: int
    max_images: int
    tokens_per_image: int
    lookahead: int
    image_costs: ImageCosts | None = None
    long_documents: Literal["split", "cut", "drop"] = "split"
    packed: bool = True

    def of_images(self, sizes: np.ndarray, num_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ImageCosts`."""
        if self.image_costs is not None:
            return self.image_costs(sizes, num_images)
        return np.ones(len(sizes), np.int64), np.full(len(sizes), self.tokens_per_image)

    def of_documents(self, source: Documents, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions that each whole document takes, and [n] images that the tower encodes for it."""
        num_images = source.num_images(documents)
        text = source.num_tokens(documents) - num_images
        if self.image_costs is None:
            return text + num_images * self.tokens_per_image, num_images
        tiles, taken = self.image_costs(source.images_of(documents)[1], num_images)
        return text + _totals(taken, num_images), _totals(tiles, num_images)


def _totals(of_images: np.ndarray, num_images: np.ndarray) -> np.ndarray:
    """[D] sums over the images of each document: the first `num_images` [D] of them, the next, and so on."""
    sums, last = np.concatenate([[0], np.cumsum(of_images)]), np.cumsum(num_images)
    return sums[last] - sums[last - num_images]


class PieceOf(NamedTuple):
    """A stretch of a document of one of a run's sources, in stored tokens."""

    source: int
    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """Documents of one source that go into one epoch of a packed stream.

    Attributes:
        number: of the source among the run's.
        name: of the source, part of the key of its order.
        documents: the prepared data.
        passes: how often an epoch visits it, at least once.
    """

    number: int
    name: str
    documents: Documents
    passes: float = 1.0


@dataclass(frozen=True)
class _Pool:
    """Packed documents: pieces sequence by sequence.

    Attributes:
        pieces: [n, 4] int64, columns of `PieceOf`.
        bounds: [sequences + 1] int64.
        images: [sequences] int64 tiles.
        positions: filled ones, of all sequences.
        documents: how many were packed.
        cut, dropped: how many others lost their end, or were left out, since they do not fit a sequence.
    """

    pieces: np.ndarray
    bounds: np.ndarray
    images: np.ndarray
    positions: int
    documents: int
    cut: int
    dropped: int


class _Cut(NamedTuple):
    """One share of a pool: its pieces [n, 4], their positions [n] and tiles [n], and what became of its documents."""

    pieces: np.ndarray
    lengths: np.ndarray
    tiles: np.ndarray
    documents: int
    cut: int
    dropped: int


class PackedStream:
    """An endless stream of sequences packed from the documents of one source, or of several in fixed proportions.

    Args:
        shares: of one epoch.
        limits: what a sequence holds.
        key: chooses the order.

    Raises:
        UserError: there is nothing to train on, or one image alone does not fit a sequence.
    """

    def __init__(self, shares: Sequence[Share], *, limits: PackingLimits, key: str) -> None:
        self.shares, self._limits = tuple(shares), limits
        self._key = f"{key}/{'+'.join(share.name for share in shares)}"
        slots = [_slots(len(share.documents)) for share in shares]
        self._slots = [round(count * share.passes) for count, share in zip(slots, shares, strict=True)]
        self.num_pools = max(1, round(sum(self._slots) / _POOL))
        self._pool = lru_cache(maxsize=_REMEMBERED_POOLS)(self._pack)
        self._epoch = lru_cache(maxsize=2)(self._order_of_pools)
        self._order = lru_cache(maxsize=_REMEMBERED_POOLS)(self._order_in_pool)
        self._counts = self._count()
        if not len(self):
            names = ", ".join(repr(share.name) for share in shares)
            raise UserError(f"data source {names} has nothing to train on")

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return int(self._counts[:, 0].sum())

    @property
    def positions_per_sequence(self) -> float:
        """Mean of the filled positions, of text and images."""
        return float(self._counts[:, 1].sum() / len(self))

    @property
    def documents_per_sequence(self) -> float:
        """Mean; a document that was cut counts once."""
        return float(self._counts[:, 2].sum() / len(self))

    @property
    def documents_of_epoch(self) -> tuple[int, int, int]:
        """Documents in one epoch, those of them that lost their end, and those that were left out besides."""
        documents, cut, dropped = self._counts[:, 2:].sum(axis=0).tolist()
        return documents, cut, dropped

    def sequence(self, index: int) -> list[PieceOf]:
        """The pieces of the stream's sequence `index`, which may be epochs on."""
        pool, place = self._locate(index)
        return [PieceOf(*piece) for piece in pool.pieces[pool.bounds[place] : pool.bounds[place + 1]].tolist()]

    def num_images(self, index: int) -> int:
        """Images (tiles) in `sequence(index)`."""
        pool, place = self._locate(index)
        return int(pool.images[place])

    def _locate(self, index: int) -> tuple[_Pool, int]:
        epoch, place = divmod(index, len(self))
        pools, starts = self._epoch(epoch)
        turn = int(np.searchsorted(starts, place, side="right")) - 1
        number = int(pools[turn])
        return self._pool(number), int(self._order(epoch, number)[place - starts[turn]])

    def _order_of_pools(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pools in the order of an epoch (those without a sequence left out), and the place where each begins."""
        pools = permutation(f"{self._key}/epoch {epoch}", self.num_pools)
        pools = pools[self._counts[pools, 0] > 0]
        counts = self._counts[pools, 0]
        return pools, np.cumsum(counts) - counts

    def _order_in_pool(self, epoch: int, number: int) -> np.ndarray:
        return permutation(f"{self._key}/epoch {epoch}/pool {number}", int(self._counts[number, 0]))

    def _count(self) -> np.ndarray:
        """[pools, 5] int64: sequences, filled positions and documents, cut and dropped ones of each pool."""

        def figures(number: int) -> tuple[int, ...]:
            pool = self._pack(number) if self.num_pools > _REMEMBERED_POOLS else self._pool(number)
            return len(pool.images), pool.positions, pool.documents, pool.cut, pool.dropped

        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
            return np.array(list(threads.map(figures, range(self.num_pools))), np.int64)

    def _pack(self, number: int) -> _Pool:
        parts = [self._cut(place, number) for place in range(len(self.shares))]
        pieces, lengths, images = (
            np.concatenate(columns) for columns in zip(*(part[:3] for part in parts), strict=True)
        )
        order = permutation(f"{self._key}/pool {number}", len(pieces))
        limits = self._limits
        if limits.packed:
            items, bounds = pack_best_fit(
                lengths[order],
                images[order],
                seq_length=limits.seq_length,
                max_images=limits.max_images,
                lookahead=limits.lookahead,
            )
            packed = order[items]
        else:
            packed, bounds = order, np.arange(len(order) + 1)
        sums = np.concatenate([[0], np.cumsum(images[packed])])
        return _Pool(
            pieces=pieces[packed],
            bounds=bounds,
            images=sums[bounds[1:]] - sums[bounds[:-1]],
            positions=int(lengths.sum()),
            documents=sum(part.documents for part in parts),
            cut=sum(part.cut for part in parts),
            dropped=sum(part.dropped for part in parts),
        )

    def _cut(self, place: int, number: int) -> _Cut:
        share = self.shares[place]
        documents = self._documents(place, number)
        num_tokens = share.documents.num_tokens(documents)
        limits = self._limits
        lengths, tiles = limits.of_documents(share.documents, documents)
        whole = np.flatnonzero((lengths <= limits.seq_length) & (tiles <= limits.max_images) & (lengths > 0))
        long = np.flatnonzero((lengths > limits.seq_length) | (tiles > limits.max_images))
        stretches, cut_lengths, cut_tiles = self._shorten(share.documents, documents[long], num_tokens[long])
        split = limits.long_documents == "split"
        dropped = 0 if split else len(long) - len(stretches)
        pieces = np.zeros((len(whole) + len(stretches), 4), np.int64)
        pieces[:, 0] = share.number
        pieces[: len(whole), 1], pieces[: len(whole), 3] = documents[whole], num_tokens[whole]
        pieces[len(whole) :, 1], pieces[len(whole) :, 2:] = documents[long][stretches[:, 0]], stretches[:, 1:]
        return _Cut(
            pieces,
            np.concatenate([lengths[whole], cut_lengths]),
            np.concatenate([tiles[whole], cut_tiles]),
            documents=len(documents) - dropped,
            cut=0 if split else len(stretches),
            dropped=dropped,
        )

    def _documents(self, place: int, number: int) -> np.ndarray:
        """[n] int64, the documents of a share in a pool: slots of whole stretches, the empty ones left out."""
        share, slots = self.shares[place], self._slots[place]
        size, stretch = len(share.documents), _stretch(len(share.documents))
        if not size:
            return np.zeros(0, np.int64)
        in_one_pass = _slots(size)
        first, stop = (slots * turn // self.num_pools // stretch * stretch for turn in (number, number + 1))
        stop = slots if number + 1 == self.num_pools else stop
        found = [np.zeros(0, np.int64)]
        while first < stop:
            pass_, begin = divmod(first, in_one_pass)
            end = min(in_one_pass, begin + stop - first)
            order = KeyedPermutation(f"{self._key}/{share.name}/pass {pass_}", in_one_pass // stretch)
            places = np.arange(begin, end)
            documents = order(places // stretch) * stretch + places % stretch
            found.append(documents[documents < size])
            first += end - begin
        return np.concatenate(found)

    def _shorten(
        self, source: Documents, documents: np.ndarray, num_tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is packed of documents that do not fit a sequence: see `split_documents` and `cut_documents`."""
        limits = self._limits
        documents = documents[:0] if limits.long_documents == "drop" else documents
        num_images = source.num_images(documents)
        positions, sizes = source.images_of(documents)
        shorten: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
        if limits.long_documents == "split":
            shorten = partial(split_documents, num_tokens)
        else:
            shorten = partial(cut_documents, source.trained(documents))
        return shorten(
            np.concatenate([[0], np.cumsum(num_images)]),
            positions,
            *limits.of_images(sizes, num_images),
            seq_length=limits.seq_length,
            max_images=limits.max_images,
        )


def _stretch(num_documents: int) -> int:
    """Neighbours that stay together: none in a source of one pool."""
    return 1 if num_documents <= _POOL else _STRETCH


def _slots(num_documents: int) -> int:
    """Documents of a source, rounded up to whole stretches."""
    return -(-num_documents // _stretch(num_documents)) * _stretch(num_documents)
