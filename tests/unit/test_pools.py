"""Packed streams: nothing lost or seen twice in an epoch, limits kept, any sequence found by itself."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm1.data import pools
from megatron_mm1.data.arrays import ranges
from megatron_mm1.data.pools import PackedStream, PackingLimits, PieceOf, Share
from megatron_mm1.errors import UserError

LIMITS = PackingLimits(seq_length=32, max_images=4, tokens_per_image=5, lookahead=8)


class Lengths:
    """A source of which only lengths exist."""

    fingerprint = "lengths"

    def __init__(self, documents: list[list[bool]]) -> None:
        """Each document says of each stored token whether it is an image."""
        self.documents = documents
        self._tokens = np.array([len(document) for document in documents], np.int64)
        self._images = np.array([sum(document) for document in documents], np.int64)
        self._positions = np.array([p for document in documents for p, image in enumerate(document) if image], np.int64)
        self._bounds = np.concatenate([[0], np.cumsum(self._images)])

    def __len__(self) -> int:
        return len(self.documents)

    def num_tokens(self, documents: np.ndarray) -> np.ndarray:
        return self._tokens[documents]

    def num_images(self, documents: np.ndarray) -> np.ndarray:
        return self._images[documents]

    def trained(self, documents: np.ndarray) -> list[np.ndarray]:
        """Answers of two tokens, of which one ends with every twelfth."""
        return [np.arange(len(self.documents[number])) % 12 >= 10 for number in documents]

    def images_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = ranges(self._bounds[documents], self._bounds[documents + 1])
        return self._positions[rows], np.stack([rows % 7 + 1, rows % 7 + 1], axis=1)


def random_source(count: int, seed: int = 0, *, most: int = 70) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths([(rng.random(rng.integers(1, most)) < 0.1).tolist() for _ in range(count)])


def stream(
    *sources: Lengths, passes: tuple[float, ...] = (), limits: PackingLimits = LIMITS, key: str = "0"
) -> PackedStream:
    passes = passes or (1.0,) * len(sources)
    shares = [Share(n, str(n), source, times) for n, (source, times) in enumerate(zip(sources, passes, strict=True))]
    return PackedStream(shares, limits=limits, key=key)


def epoch(packed: PackedStream, number: int = 0) -> list[list[PieceOf]]:
    return [packed.sequence(number * len(packed) + place) for place in range(len(packed))]


def covered(sequences: list[list[PieceOf]]) -> Counter[tuple[int, int, int]]:
    """How often each (source, document, token) is in them."""
    return Counter(
        (piece.source, piece.document, token)
        for sequence in sequences
        for piece in sequence
        for token in range(piece.start, piece.stop)
    )


def every_token(*sources: Lengths) -> set[tuple[int, int, int]]:
    return {
        (number, document, token)
        for number, source in enumerate(sources)
        for document, tokens in enumerate(source.documents)
        for token in range(len(tokens))
    }


@pytest.fixture(params=[65_536, 512], ids=["one pool", "many pools"])
def pool_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pools, "_POOL", request.param)
    return request.param


documents = st.lists(st.lists(st.sampled_from([False] * 6 + [True]), max_size=60), min_size=1, max_size=40)


@settings(max_examples=50)
@given(documents)
def test_an_epoch_has_every_token_once_within_limits(documents: list[list[bool]]) -> None:
    source = Lengths(documents)
    if not any(documents):
        with pytest.raises(UserError, match="nothing to train on"):
            stream(source)
        return
    packed = stream(source)
    for number in (0, 3):
        sequences = epoch(packed, number)
        assert covered(sequences) == Counter(every_token(source))
        for place, sequence in enumerate(sequences):
            images = sum(sum(documents[piece.document][piece.start : piece.stop]) for piece in sequence)
            length = sum(piece.stop - piece.start for piece in sequence) + images * (LIMITS.tokens_per_image - 1)
            assert 0 < length <= LIMITS.seq_length
            assert images <= LIMITS.max_images
            assert packed.num_images(number * len(packed) + place) == images


def test_nothing_is_lost_between_pools(pool_size: int) -> None:
    source = random_source(3000)
    packed = stream(source)
    assert packed.num_pools == (1 if pool_size == 65_536 else 6)
    assert covered(epoch(packed)) == Counter(every_token(source))


def test_documents_that_are_not_packed_are_alone_in_their_sequences(pool_size: int) -> None:
    source = random_source(500)
    alone = stream(source, limits=replace(LIMITS, packed=False))
    sequences = epoch(alone)
    assert {len(sequence) for sequence in sequences} == {1}
    assert covered(sequences) == dict.fromkeys(every_token(source), 1)
    assert alone.documents_per_sequence == pytest.approx(500 / len(sequences))


def test_epochs_have_the_same_sequences_in_another_order(pool_size: int) -> None:
    packed = stream(random_source(1500))
    first, second = epoch(packed), epoch(packed, 1)
    assert first != second
    assert sorted(first) == sorted(second)


def test_any_sequence_is_found_without_those_before(pool_size: int) -> None:
    source = random_source(1500)
    one_by_one = epoch(stream(source))
    for place in (0, 7, len(one_by_one) // 2, len(one_by_one) - 1):
        assert stream(source).sequence(place) == one_by_one[place]


def test_the_key_chooses_the_order() -> None:
    source = random_source(300)
    assert epoch(stream(source, key="1")) != epoch(stream(source, key="2"))


def test_a_sequence_mixes_documents_from_all_over_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_POOL", 2048)
    source = Lengths([[False] * 2] * 65_536)
    packed = stream(source, limits=PackingLimits(seq_length=64, max_images=4, tokens_per_image=5, lookahead=8))
    spread = [np.std([piece.document for piece in packed.sequence(place)]) for place in range(100)]
    assert np.mean(spread) > 0.6 * 65_536 / np.sqrt(12)  # a uniform choice has 1.0; eight stretches a pool have less


def test_sources_are_mixed_in_the_given_proportion(pool_size: int) -> None:
    one, other = random_source(512, 1, most=12), random_source(1024, 2, most=12)
    packed = stream(one, other, passes=(3.0, 1.0))
    seen = covered(epoch(packed))
    for number, document, token in every_token(one, other):
        assert seen[number, document, token] == (3 if number == 0 else 1)
    both = [len({piece.source for piece in sequence}) for sequence in epoch(packed)]
    assert np.mean(both) > 1.6


def test_a_fraction_of_a_pass_sees_no_document_more_often_than_another_by_two() -> None:
    one, other = random_source(512, 1), random_source(1024, 2)
    seen = covered(epoch(stream(one, other, passes=(2.5, 1.0))))
    times = Counter(seen[token] for token in every_token(one, other) if token[0] == 0)
    assert set(times) == {2, 3}


def test_figures_are_those_of_the_sequences() -> None:
    source = random_source(700)
    packed = stream(source)
    positions = sum(len(d) + sum(d) * (LIMITS.tokens_per_image - 1) for d in source.documents)
    assert packed.positions_per_sequence == pytest.approx(positions / len(packed))
    assert packed.documents_per_sequence == pytest.approx(700 / len(packed))


def test_tiles_count_as_images(pool_size: int) -> None:
    def three_if_large(sizes: np.ndarray, num_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where there are three, a text of two tokens stands in front of each."""
        tiles = np.where((sizes[:, 0] > 4) & (np.repeat(num_images, num_images) < 3), 3, 1)
        return tiles, np.where(tiles == 3, 3 * (5 + 2), 5)

    limits = PackingLimits(seq_length=32, max_images=4, tokens_per_image=5, lookahead=8, image_costs=three_if_large)
    source = random_source(600)
    packed = stream(source, limits=limits)
    sequences = epoch(packed)
    assert covered(sequences) == Counter(every_token(source))
    for place, sequence in enumerate(sequences):
        tiles = length = 0
        for piece in sequence:
            positions, sizes = source.images_of(np.array([piece.document]))
            each, taken = three_if_large(sizes, np.array([len(positions)]))
            inside = (positions >= piece.start) & (positions < piece.stop)
            tiles += int(each[inside].sum())
            length += piece.stop - piece.start + int((taken[inside] - 1).sum())
        assert tiles == packed.num_images(place) <= limits.max_images
        assert length <= limits.seq_length


class Endless(Lengths):
    """A corpus too large to exist: lengths are functions of the document's number."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def num_tokens(self, documents: np.ndarray) -> np.ndarray:
        return documents % 61 + 1

    def num_images(self, documents: np.ndarray) -> np.ndarray:
        return np.zeros_like(documents)

    def images_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64)


def test_one_pool_of_a_billion_documents_costs_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing grows with the corpus but three numbers a pool; those are given here, they take minutes to count."""
    monkeypatch.setattr(PackedStream, "_count", lambda packed: np.full((packed.num_pools, 3), 30_000))
    packed = stream(Endless(10**9))
    assert packed.num_pools == round(10**9 / 65_536)
    documents = packed._documents(0, packed.num_pools // 2)
    assert len(documents) == pytest.approx(65_536, abs=512)
    assert documents.max() - documents.min() > 9 * 10**8


def positions_of(source: Lengths, document: int, stop: int, limits: PackingLimits) -> tuple[int, int]:
    """Positions and images of the first `stop` tokens of a document."""
    images = sum(source.documents[document][:stop])
    return stop - images + images * limits.tokens_per_image, images


@pytest.mark.parametrize("policy", ["cut", "drop"])
def test_long_documents_end_with_their_last_answer_that_fits_or_are_left_out(policy: str) -> None:
    rng = np.random.default_rng(0)
    source = Lengths([(rng.random(rng.integers(1, 70)) < 0.2).tolist() for _ in range(400)])
    limits = replace(LIMITS, long_documents=policy)
    packed = stream(source, limits=limits)
    pieces = {piece.document: piece for sequence in epoch(packed) for piece in sequence}
    cut = dropped = choices = 0
    for number, document in enumerate(source.documents):

        def fits(stop: int, number: int = number) -> bool:
            positions, images = positions_of(source, number, stop, limits)
            return positions <= limits.seq_length and images <= limits.max_images

        if fits(len(document)):
            assert pieces[number][2:] == (0, len(document))
            continue
        trained = source.trained(np.array([number]))[0]
        ends = [n for n in range(1, len(document) + 1) if trained[n - 1] and not (n < len(document) and trained[n])]
        fitting = [end for end in ends if fits(end)]
        if policy == "cut" and fitting:
            assert pieces[number][2:] == (0, fitting[-1])
            cut += 1
            choices += len(fitting) > 1
        else:
            assert number not in pieces
            dropped += 1
    assert sum(len(sequence) for sequence in epoch(packed)) == len(pieces)
    assert packed.documents_of_epoch == (400 - dropped, cut, dropped)
    assert dropped > 10 and (cut > 10) == (choices > 10) == (policy == "cut")


def test_a_source_of_which_nothing_fits_is_told() -> None:
    source = Lengths([[False] * 40] * 3)
    with pytest.raises(UserError, match="data source '0' has nothing to train on"):
        stream(source, limits=replace(LIMITS, long_documents="drop"))
