"""MMMU (Yue et al. 2024): multiple choice, and short answers compared as its code does."""

import re
from collections.abc import Sequence

from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.choice import chosen_letter
from megatron_mm1.evaluation.task import Measure, Measures

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_DECIMALS = 2


def mmmu_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> list[Measures]:
    """Right letters, and for items without choices, answers that contain a truth or its number."""
    return [
        {"accuracy": Measure(float(_is_chosen(text, item) if item.choices else is_answered(text, item.truths)))}
        for item, text in zip(items, predictions, strict=True)
    ]


def is_answered(text: str, truths: Sequence[str]) -> bool:
    """Whether an answer gives one of `truths`: its number to two decimals, or its text in what is concluded."""
    parts = _conclusions(text)
    numbers = {number for part in parts for found in _NUMBER.findall(part) if (number := _number(found)) is not None}
    for truth in truths:
        number = _number(truth)
        if number is not None:
            if number in numbers:
                return True
        elif any(_holds(part, truth.strip().lower()) for part in parts):
            return True
    return False


def _is_chosen(text: str, item: Item) -> bool:
    return chosen_letter(text, item.choices) == item.answer


def _conclusions(text: str) -> list[str]:
    """What follows a word such as "is" or "therefore" in each sentence; the whole text where there is none."""
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text.strip().strip("."))
    concluded = []
    for index, sentence in enumerate(sentences):
        marks = (*_INDICATORS, "=") if index == len(sentences) - 1 else _INDICATORS
        tails = [sentence.lower().rpartition(mark)[2].strip() for mark in marks if mark in sentence.lower()]
        if tails and (shortest := min(tails, key=len)).strip(":,.!?;'"):
            concluded.append(shortest)
    return concluded or [text.strip().strip(".").lower()]


def _number(text: str) -> float | None:
    try:
        return round(float(text.strip().replace(",", "")), _DECIMALS)
    except ValueError:
        return None


def _holds(part: str, truth: str) -> bool:
    """A single letter must stand alone, or every word would hold it."""
    return truth in part if len(truth) > 1 else truth in part.split()
