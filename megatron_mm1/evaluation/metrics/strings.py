"""Answers compared as strings and as numbers."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.task import Measure, Measures

_ANLS_THRESHOLD = 0.5
_TOLERANCE = 0.05


def exact_match(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Whether the prediction is one of the truths, character by character."""
    return [
        {"exact_match": Measure(float(prediction in item.truths))}
        for item, prediction in zip(items, predictions, strict=True)
    ]


def anls(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Average normalized Levenshtein similarity to the nearest truth (Biten et al. 2019)."""
    return [
        {"anls": Measure(max(levenshtein_similarity(prediction, truth) for truth in item.truths))}
        for item, prediction in zip(items, predictions, strict=True)
    ]


def relaxed_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Whether the prediction is a truth but for case, or within 5 % of one that is a number (Masry et al. 2022)."""
    return [
        {"relaxed_accuracy": Measure(float(any(is_nearly(prediction, truth) for truth in item.truths)))}
        for item, prediction in zip(items, predictions, strict=True)
    ]


def levenshtein_similarity(prediction: str, truth: str) -> float:
    """1 - distance / the longer's length, without regard to case and spacing; 0 below one half.

    Similarities of exactly one half count, as in the benchmark's code.
    """
    texts = [" ".join(text.lower().split()) for text in (prediction, truth)]
    similarity = Levenshtein.normalized_similarity(*texts)
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def is_nearly(prediction: str, truth: str) -> bool:
    """Whether two numbers are within 5 % of the second, or two texts the same but for case; "5%" is 0.05."""
    prediction, truth = prediction.strip(), truth.strip()
    number, true_number = as_number(prediction), as_number(truth)
    if number is None or not true_number:
        return prediction.lower() == truth.lower()
    return abs(number - true_number) <= _TOLERANCE * abs(true_number)


def as_number(text: str) -> float | None:
    """The number that `text` is; None where it is none."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
