"""POPE (Li et al. 2023): is an object in the image?"""

from collections.abc import Sequence

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.task import Measure, Measures

_NEGATIONS = frozenset(("No", "no", "not"))


def pope(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """accuracy, precision, recall and f1 of "yes", and yes_ratio, the share of predictions that say yes.

    F1 is 2 TP / (2 TP + FP + FN): the mean of "is a true positive", where those weigh 2 and errors 1.
    """
    return [_measures(says_yes(text), item.answer == "yes") for item, text in zip(items, predictions, strict=True)]


def says_yes(text: str) -> bool:
    """Whether an answer says yes: its first sentence negates nothing, as the benchmark's code has it."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return _NEGATIONS.isdisjoint(words)


def _measures(predicted: bool, true: bool) -> Measures:
    hit = float(predicted and true)
    return {
        "accuracy": Measure(float(predicted == true)),
        "precision": Measure(hit, weight=float(predicted)),
        "recall": Measure(hit, weight=float(true)),
        "f1": Measure(hit, weight=float(predicted) + float(true)),
        "yes_ratio": Measure(float(predicted)),
    }
