"""CIDEr-D (Vedantam et al. 2015), as COCO's evaluation code computes it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.ptb import tokenize
from megatron_mm1.evaluation.task import Measure, Measures

_LONGEST = 4
_LENGTH_SIGMA = 6.0
_SCALE = 10.0

Ngram = tuple[str, ...]


def cider(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """CIDEr-D of each caption, about 1 for a good one; published tables multiply it by 100.

    N-grams weigh by how rare they are among the references of all `items`, so an item's score depends on the others.
    Intervals resample items with these weights as they are.
    """
    references = [[tokenize(reference) for reference in item.truths] for item in items]
    scores = cider_d([tokenize(prediction) for prediction in predictions], references)
    return [{"cider": Measure(score)} for score in scores]


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of tokenized captions.

    Args:
        captions: tokens of one caption for each image.
        references: tokens of one or more true captions for each image.

    Raises:
        ValueError: the arguments differ in length, or an image has no reference.
    """
    counted = [[_ngrams(tokens) for tokens in of_image] for of_image in references]
    if not all(counted):
        raise ValueError("an image has no reference caption")
    frequency: Counter[Ngram] = Counter()
    for of_image in counted:
        frequency.update(set().union(*of_image))
    weigh = _Weights(frequency, math.log(len(counted))) if counted else None
    scores = []
    for caption, of_image in zip(captions, counted, strict=True):
        assert weigh is not None
        vector = weigh.vector(_ngrams(caption))
        similarities = [_similarity(vector, weigh.vector(reference)) for reference in of_image]
        scores.append(_SCALE * sum(similarities) / len(similarities))
    return scores


@dataclass(frozen=True)
class _Vector:
    """TF-IDF of a caption by n-gram length.

    Attributes:
        weights, norms: for each length from 1 to `_LONGEST`.
        length: in bigrams, as the original counts it.
    """

    weights: tuple[Mapping[Ngram, float], ...]
    norms: tuple[float, ...]
    length: int


@dataclass(frozen=True)
class _Weights:
    """Inverse document frequencies.

    Attributes:
        frequency: in how many images' references an n-gram stands.
        log_images: of how many images.
    """

    frequency: Mapping[Ngram, int]
    log_images: float

    def vector(self, counts: Mapping[Ngram, int]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
        for ngram, count in counts.items():
            rarity = self.log_images - math.log(max(1, self.frequency.get(ngram, 0)))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(weight * weight for weight in of_length.values())) for of_length in weights]
        return _Vector(tuple(weights), tuple(norms), sum(n for ngram, n in counts.items() if len(ngram) == 2))


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(tokens) - n + 1))


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """The mean over n-gram lengths of the cosine, clipped at the reference's weights, under a length penalty."""
    cosines = (
        _clipped_dot(own, true) / (norm * true_norm) if norm and true_norm else 0.0
        for own, true, norm, true_norm in zip(
            caption.weights, reference.weights, caption.norms, reference.norms, strict=True
        )
    )
    penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * _LENGTH_SIGMA**2))
    return penalty * sum(cosines) / _LONGEST


def _clipped_dot(own: Mapping[Ngram, float], true: Mapping[Ngram, float]) -> float:
    common: Iterable[Ngram] = own.keys() & true.keys()
    return math.fsum(min(own[ngram], true[ngram]) * true[ngram] for ngram in common)
